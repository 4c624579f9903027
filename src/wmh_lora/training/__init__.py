"""Training: losses, the training loop and its settings. Needs the ``train`` extra (`peft`)."""
