"""Entry point of ``python -m convert``."""

from kt_kernel.program import run_program

if __name__ == "__main__":
    run_program("convert.command:main")
