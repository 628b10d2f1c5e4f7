"""Train or evaluate a vision state-space model.

    python train_tpu.py --config configs/digits.py                  # five minutes on a CPU, data included
    python train_tpu.py --config configs/evmamba_t.py               # ImageNet, as the released weights were trained
    python train_tpu.py --config configs/evmamba_t.py:paper         # a named variant of the same file
    python train_tpu.py --config configs/evmamba_t.py --config.optim.lr=1e-3 --config.batch_size=512
    python train_tpu.py --config configs/evmamba_t.py --config.eval_only=True --config.init_from=FILE.pth

--config FILE[:VARIANT]     a file of configs/, or its name alone
--config.NAME=VALUE         replace a value; evmamba_jax/config.py and data/config.py list the names
--workdir DIR               where everything is written (default: runs/NAME_OF_THE_CONFIG); started again with the
                            same folder, a run continues from its newest checkpoint
"""

import sys


def main(argv: list[str]) -> int:
    """Run the command; return its exit code: 0, 2 for a user's mistake, 128 + signal after one."""
    if len(argv) == 1 or {"-h", "--help", "-help"} & set(argv):
        print(__doc__.strip())
        return 0 if len(argv) > 1 else 2
    from evmamba_jax import train

    return train.main(argv[1:], prog=argv[0])


if __name__ == "__main__":
    sys.exit(main(sys.argv))
