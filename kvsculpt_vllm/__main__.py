"""`python -m kvsculpt_vllm` is `kvsculpt`, for whoever knows the interpreter and not where its scripts are."""

from kvsculpt_vllm.cli import main

if __name__ == "__main__":
    main()
