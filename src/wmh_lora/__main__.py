"""Run the command line with ``python -m wmh_lora``."""

from wmh_lora.cli.main import main

if __name__ == "__main__":
    main()
