"""What a user did, told apart from what we did."""


class UserError(ValueError):
    """Something that a user can mend, in one sentence that says what is wrong and what would be right.

    The command line prints it in one line and exits with 1. Whatever else is raised is a bug of ours and shows its
    traceback, so nothing raises this by accident: no library does, and no check of ours that no user can reach.
    """
