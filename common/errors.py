"""Errors that the user can fix. Their message is one line that says what is wrong and what to do."""


class UserError(Exception):
    """Wrong settings, a missing checkpoint, a full disk, ..."""


class DataError(UserError):
    """The folder of paintings is not laid out as expected."""
