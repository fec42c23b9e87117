#!/usr/bin/env bash
# Makes every number and picture of the README and of docs/ again. What is done is not done again, so stop it
# whenever you like and start it again. A day on two cores.
#
#     bash benchmarks/reproduce.sh DATA [EMOJI]
#
# DATA: a folder with the files of MNIST and CIFAR-10, or to download them to; EMOJI: a folder of captioned
# pictures, for one picture of docs/mdm.md.
set -euo pipefail
data=$(realpath "${1:?say where the data lie, or are to be downloaded to: bash benchmarks/reproduce.sh DATA}")
emoji=${2:+$(realpath "$2")}
cd "$(dirname "$0")/.."
mkdir -p results/reproduced
SECONDS=0

step() {                                # name, then a command: run once, its output kept
    local done=results/reproduced/$1.txt
    [ -e "$done" ] && return
    echo "== ${*:2}"
    "${@:2}" | tee "$done.part"
    mv "$done.part" "$done"
}

# the README's first minutes, and its picture of shapes
step shapes python train.py
step mypaper python train.py --model examples/mypaper.py
step mypaper-sample python sample.py --model examples/mypaper.py --ckpt results/mypaper-shapes

# the judge, and all studies; the weights of the first are what the last two look at
step judge python benchmarks/judge.py --data mnist --data-dir "$data" --cache results/evidence
python benchmarks/evidence.py minutes --data-dir "$data"
for model in dis diffussm mdm cunet; do
    arm=$model; [ $model = cunet ] && arm=cu-net
    step share-$model python checkpoint.py results/evidence/mnist-minutes-$arm-0 assets/$model-mnist.pt
    cp results/evidence/mnist-minutes-$arm-0/log.csv assets/$model-mnist.csv
    step draw-$model python sample.py --ckpt assets/$model-mnist.pt --out assets/$model-mnist.png
done
python benchmarks/evidence.py --data-dir "$data"
python benchmarks/evidence.py colour --data cifar10 --data-dir "$data"
python benchmarks/figures.py > docs/results.md

# speed and faults
for name in scan s4d memory kill processes; do step $name python benchmarks/$name.py; done
step step python benchmarks/step.py -- --data mnist --data-dir "$data"
for paper in dis diffussm mdm cunet; do step table-$paper python $paper.py; done
echo "all of it is there; this call took $((SECONDS / 60)) minutes"
