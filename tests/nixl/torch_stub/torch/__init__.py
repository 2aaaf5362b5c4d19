"""A stand-in for torch, for NIXL's wheels before 1.4, whose Python module imports it to ask whether an argument is a tensor. None is."""


class Tensor:
    """Never a tensor."""
