"""What the user can mend."""


class UsageError(ValueError):
    """A flag or a protocol file asks for something that does not exist; the message is one line."""
