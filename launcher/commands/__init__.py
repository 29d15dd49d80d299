"""What can be typed?

One module for each command of `efflaunch`: its arguments and its main; *_view.py print what a command found out. Imported by cli.py, at
the moment of use.
"""
