"""What a variational model says of itself, wherever it keeps it."""


def settings_of(model):
    """
    What has a model's `eve`, `attention`, `kl_weight`, `objective` and `num_posterior_samples`: the settings of a
    retrofitted one (also inside a wrapper of peft), and the configuration of any other.
    """
    settings = getattr(model, "settings", None)
    return model.config if settings is None else settings
