"""What the operating system says of a file, in words."""


def in_words(error: OSError) -> str:
    """The file and what is wrong, without the system's number: "x/config.json: permission denied"."""
    if not error.strerror:
        return str(error)
    where = "" if error.filename is None else f"{error.filename}: "
    return where + error.strerror.lower()
