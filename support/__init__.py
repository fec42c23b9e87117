"""The machinery below the papers. A reader of the papers need never open it.

    data        datasets, shapes (drawn), text (of captions), latents (of a VAE), inputs (for train.py),
                prepare (a command)
    runs        checkpoint, parallel (devices, processes), cli (errors, flags), options (of `build`), log, optimizer
    results     pictures, fid, denoise, cost (multiply-adds, memory), inside (a command: looks into a trained network)
    speed       threads (how many, and how they wait), scan (of DiS), longconv (of DiffuSSM)
    baselines   unet, published (both of cU-Net); released_mdm (a command: reads the authors' weights)
    a name      namesake: lets a file be called dis.py

The papers, train.py and sample.py import from here; nothing here imports them.
"""
from support import threads     # noqa: F401 (it says to torch's libraries how many to start, before they are loaded)
