"""Text that is shown to people."""


def one_line(value: object) -> str:
    """Text without line breaks, escape codes or other characters that a terminal would act on."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
