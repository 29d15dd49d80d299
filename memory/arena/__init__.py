"""Where every tensor of a step goes: traced, planned once, replayed under guard."""
