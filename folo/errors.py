"""Every error that folo raises on purpose. Each message names the value at fault and the fix."""


class FoloError(Exception):
    """Base class: `except folo.FoloError` catches everything folo raises on purpose."""


class ConfigError(FoloError, ValueError):
    """A configuration value is out of range, or two of them contradict each other."""


class RequestError(FoloError, ValueError):
    """A request, or a call about one, cannot be served: bad value, duplicate or unknown id, too long."""


class LoadError(FoloError):
    """A checkpoint or tokenizer is missing, damaged, unsupported, or refused for safety."""


class StaleBatchError(FoloError):
    """A batch was given to `step` with a state that it was not scheduled for."""


class ParamsMismatchError(FoloError):
    """A state was used with `Params` that it does not belong to."""


class OutOfBlocksError(FoloError, MemoryError):
    """The KV heap has no free block left: states that the caller still holds pin them all."""


class RestoreError(FoloError):
    """A saved state is missing, damaged, of another version, or cannot go on here with the same bits."""


class IntegrityError(FoloError, AssertionError):
    """`folo.check` found a state whose parts contradict each other: a defect of folo, please report it."""
