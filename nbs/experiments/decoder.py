"""The shipped VAE's decoder, trained on with its encoder held, so that latents, teacher and student stay as they are.

    python nbs/experiments/decoder.py FOLDER [--steps 3000]   # FOLDER/vae is to be copied into both weights

Before: 36.7 to 38 dB a frame, and a green deficit of .04 and .03 (of a range of 2) on the strokes of the first and
last."""
import argparse
from pathlib import Path
import torch
from einops import rearrange
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from sfv_lite.pipelines import load_pipeline
from sfv_lite.sfv import rate, set_rate
from sfv_lite.svd import decode, encode
from sfv_lite.video import moving_digits


def report(pipe, n:int=256)->dict:
    "PSNR of every frame in decibels; how much less green than red and blue its strokes are, of a range of 2"
    x,_ = moving_digits(n, 77, 'test')
    y = torch.cat([decode(pipe.vae, o) for o in encode(pipe, x).latents.split(32)])
    strokes = (x[:,:,0]>0).float()
    green = y[:,:,1]-(y[:,:,0]+y[:,:,2])/2
    return dict(psnr=10*torch.log10(4/(y-x).square().mean((0,2,3,4))),
        green=(green*strokes).sum((0,2,3))/strokes.sum((0,2,3)))


def train(pipe, steps:int, batch:int=8, lr:float=1e-3):
    "L1 + L2 of the pixels, as in `vae_loss`, for the decoder alone; the average of the last steps is kept"
    vae,g = pipe.vae.train(),torch.Generator().manual_seed(0)
    vae.requires_grad_(False)
    vae.decoder.requires_grad_(True)
    params = list(vae.decoder.parameters())
    opt = torch.optim.AdamW(params, lr, weight_decay=0.)
    average = AveragedModel(vae.decoder, multi_avg_fn=get_ema_multi_avg_fn(.995))
    with tqdm(range(steps), 'decoder') as bar:
        for step in bar:
            x,_ = moving_digits(batch, 1_000_000+step)
            frames = rearrange(x, 'b t c h w -> (b t) c h w')
            with torch.no_grad(): posterior = vae.encode(frames).latent_dist
            z = posterior.mean + posterior.std*torch.randn(posterior.mean.shape, generator=g)
            y = vae.decode(z, num_frames=x.shape[1]).sample
            loss = F.l1_loss(y, frames) + F.mse_loss(y, frames)
            set_rate(opt, lr*rate(step, steps, 50, 'cosine'))
            opt.zero_grad()
            loss.backward()
            opt.step()
            average.update_parameters(vae.decoder)
            if step%20==0: bar.set_postfix(loss=f'{loss.item():.4f}')
    vae.decoder.load_state_dict(average.module.state_dict())
    vae.eval()


if __name__=='__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path)
    parser.add_argument('--steps', type=int, default=3000)
    args = parser.parse_args()
    torch.manual_seed(0)
    pipe = load_pipeline('digits-teacher')
    print(report(pipe))
    train(pipe, args.steps)
    pipe.vae.half().save_pretrained(args.folder/'vae')
    pipe.vae.float()
    print(report(pipe))
