"""The one error class that reaches a user as a single line instead of a traceback."""


class UserError(Exception):
    """Something the user gave cannot work. The message says what was given, what is allowed and the fix."""
