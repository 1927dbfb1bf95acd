"""Where the model classes are that a `config.json` may name. Their modules are imported when such a model is opened."""

# Class name to module. Packages above this one add their own in their `__init__`.
MODEL_MODULES = {
    "CLIP": "dalle_pytorch.clip.trainable", "DALLE": "dalle_pytorch.priors.dalle",
    "DalleBart": "dalle_pytorch.priors.min_dalle", "MinDALLE": "dalle_pytorch.priors.mindalle",
    "DiscreteVAE": "dalle_pytorch.vae.discrete", "OpenAIDiscreteVAE": "dalle_pytorch.vae.openai",
    "PublishedCLIP": "dalle_pytorch.clip.published", "VQGanVAE": "dalle_pytorch.vae.vqgan",
}  # fmt: skip
