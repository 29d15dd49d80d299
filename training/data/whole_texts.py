"""Splits pairs of whole conversations, each as one text, into the prompt they share and the two answers.

Note: the form is that of Anthropic's HH-RLHF: turns begin with `\\n\\nHuman:` and `\\n\\nAssistant:`, the first of them the same in both.
"""

from __future__ import annotations

from .messages import bad_record

ASSISTANT, HUMAN = "\n\nAssistant:", "\n\nHuman:"


def split_pair(where: str, prompt: str | None, chosen: str, rejected: str) -> tuple[str, str, str]:
    """Prompt and answers of a pair of texts. DataError where nothing says what the prompt is.

    Answers beside a prompt are taken as they stand, unless both are whole conversations that begin with it.
    """
    if prompt is None:
        shared = chosen.rfind(ASSISTANT)
        while shared >= 0 and not rejected.startswith(chosen[: shared + len(ASSISTANT)]):
            shared = chosen.rfind(ASSISTANT, 0, shared)
        if shared < 0:
            raise bad_record(
                where,
                "nothing in 'prompt', and no turn of the assistant's in what 'chosen' and 'rejected' begin with",
                f"'prompt', or two texts that begin with the same turns, up to {ASSISTANT!r}",
            )
        prompt = chosen[: shared + len(ASSISTANT)]
    elif ASSISTANT not in prompt or not (chosen.startswith(prompt) and rejected.startswith(prompt)):
        return prompt, chosen, rejected
    answers = chosen[len(prompt) :], rejected[len(prompt) :]
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        if HUMAN in answer:
            raise bad_record(where, f"a turn of the user's inside the answer in '{name}'", "answers that end before the next turn")
    return prompt, *answers
