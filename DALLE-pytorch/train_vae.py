from dalle_pytorch.cli import run
from dalle_pytorch.training.commands.train_vae import main

if __name__ == "__main__":
    run(main)
