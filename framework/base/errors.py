"""The errors that reach a user as a single line instead of a traceback."""


class UserError(Exception):
    """Something the user gave cannot work. The message says what was given, what is allowed and the fix."""


class TrainingStopped(Exception):
    """Training cannot usefully go on. The message says why and what to change; a checkpoint is saved."""
