"""Whether the choices of [svd-lora] and [svd-weekend] hold where they can be afforded: the same kinds of run on digits.
What is done is skipped, what was stopped goes on.

    python nbs/experiments/kinds.py FOLDER [--only ROW …] [--seed 0] [--clips 512]

Runs lie in FOLDER; figures in nbs/experiments/kinds.json. One thread a process: OMP_NUM_THREADS=1"""
import argparse, functools, json
from pathlib import Path
from tables import hinge
from sfv_lite import fit
from sfv_lite.evaluate import Exam, Way
from sfv_lite.files import write_text
from sfv_lite.recipe import Recipe
from sfv_lite.train import distil

RESULTS = Path(__file__).parent/'kinds.json'
LORA = dict(lora_rank=16, lr_g=5e-4)
ROWS = { # what each changes in [digits]
    'LoRA':LORA, 'LoRA in attention only':LORA, 'LoRA, slow judges':LORA | dict(lr_d=5e-4),
    'LoRA, no head start':LORA | dict(head_start=0), 'LoRA, T_g 4':LORA | dict(T_g=4),
    'LoRA, SM3':LORA | dict(optimizer='sm3'), 'LoRA, rank 4':LORA | dict(lora_rank=4), 'every weight':{},
    'LoRA, SM3 at tenfold rates':LORA | dict(optimizer='sm3', lr_g=5e-3, lr_d=6e-2)}
ATTENTION = 'to_q','to_k','to_v','to_out.0' # what had additions before


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder', type=Path)
    p.add_argument('--only', nargs='*', default=[*ROWS], choices=[*ROWS])
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--clips', type=int, default=512)
    a = p.parse_args()
    everywhere,exam = fit.LEARNS,functools.cache(lambda: Exam(a.clips))
    for name in a.only:
        rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
        if any((o['kind'],o['seed'])==(name,a.seed) for o in rows): continue
        fit.LEARNS = list(ATTENTION) if 'attention' in name else everywhere
        out,recipe = a.folder/f'{name} {a.seed}',Recipe.load('digits', seed=a.seed, precision='no', **ROWS[name])
        if not (out/'pipeline').exists(): distil(recipe, out, resume=out.exists())
        row = exam().sit(Way(str(out)))[0] | dict(kind=name, seed=a.seed, clips=a.clips) | hinge(out)
        del row['clips by'] # a path of this machine
        write_text(RESULTS, json.dumps([*rows, row], indent=1)+'\n')


if __name__=='__main__': main()
