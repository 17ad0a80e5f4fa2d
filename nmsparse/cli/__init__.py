"""Sub-commands of ``python -m nmsparse``: a module each, with ``add_arguments(parser)`` and ``main(args) -> int``."""
