#!/usr/bin/env bash
# Makes the main numbers and the pictures of README.md and docs/ again. You can stop it at any time: the next start goes
# on with what is missing. It has not yet been run as a whole; its parts take many hours on two cores.
#
#     bash benchmarks/reproduce.sh DATA
#
# DATA: a folder with the files of MNIST and CIFAR-10, or the folder to download them to. Needs matplotlib.
set -euo pipefail
data=$(realpath "${1:?say where MNIST is, or where to download it to: bash benchmarks/reproduce.sh DATA}")
cd "$(dirname "$0")/.."
runs=results/reproduced/runs            # apart from yours
mkdir -p $runs
SECONDS=0

step() {                                # step NAME COMMAND: run the command once and keep its output
    local done=results/reproduced/$1.txt
    [ -e "$done" ] && return
    echo "== ${*:2}"
    "${@:2}" | tee "$done.part"
    ! grep -q "^stopped " "$done.part" || exit 1            # somebody stopped train.py: it goes on next time
    mv "$done.part" "$done"
}

# the first minutes of README.md
step shapes python train.py --results-dir $runs
cp $runs/dis-shapes/samples.png assets/shapes.png
cp $runs/dis-shapes/log.csv assets/shapes.csv
step share-shapes python -m support.checkpoint $runs/dis-shapes assets/dis-shapes.pt
for model in diffussm mdm cunet; do     # with these logs train.py tells the loss to expect (support/log.py)
    step shapes-$model python train.py --model $model --results-dir $runs
    cp $runs/$model-shapes/log.csv assets/$model-shapes.csv
    cp $runs/$model-shapes/samples.png assets/$model-shapes.png
done
step mypaper python train.py --model examples/mypaper.py --results-dir $runs
step mypaper-sample python sample.py --model examples/mypaper.py --ckpt $runs/mypaper-shapes \
    --out results/reproduced/mypaper.png

# the judge, equal time, and a claim of each paper
step judge python benchmarks/judge.py --data mnist --data-dir "$data"
# Speeds that are known stay, and so do the steps.
step speed python benchmarks/evidence.py --speed --missing --data-dir "$data"
step speed-cifar10 python benchmarks/evidence.py minutes --speed --missing --data cifar10 --data-dir "$data"
python benchmarks/evidence.py --seeds 0 --data-dir "$data"
python benchmarks/evidence.py minutes dis-patches mdm --seeds 1 --data-dir "$data"
python benchmarks/evidence.py minutes --seeds 2 --data-dir "$data"
python benchmarks/evidence.py minutes --data cifar10 --seeds 0 --data-dir "$data"
for model in dis diffussm mdm cunet; do
    arm=$model; [ $model = cunet ] && arm=cu-net
    step share-$model python -m support.checkpoint results/evidence/mnist-minutes-$arm-0 assets/$model-mnist.pt
    cp results/evidence/mnist-minutes-$arm-0/log.csv assets/$model-mnist.csv
    step draw-$model python sample.py --ckpt assets/$model-mnist.pt --out assets/$model-mnist.png
done
for arm in dis diffussm mdm cu-net u-net; do
    step draw-cifar10-$arm python sample.py --ckpt results/evidence/cifar10-minutes-$arm-0 --num-samples 60 \
        --out assets/cifar10-hour-$arm.png
done
step draw-fours python sample.py --ckpt assets/mdm-mnist.pt --class-labels 4 --num-samples 8 --seed 7 --cfg-scale 3 \
    --gif --out results/mdm-fours.png
cp results/mdm-fours.gif assets/mdm-fours.gif
python benchmarks/figures.py --into docs/*.md               # tables and figures; the words are yours to check

# photographs
step cifar10 python train.py --model mdm --data cifar10 --data-dir "$data" --preset small --hflip --lr 1e-3 \
    --warmup-steps 500 --max-steps 8000 --results-dir $runs
cp $runs/mdm-cifar10/log.csv assets/cifar10-mdm.csv
step draw-cifar10 python sample.py --ckpt $runs/mdm-cifar10 --cfg-scale 3 --num-samples 60 --out assets/cifar10-mdm.png
[ -e results/reproduced/draw-cifar10-500.txt ] || rm -rf results/reproduced/cifar10-500
step draw-cifar10-500 python sample.py --ckpt $runs/mdm-cifar10 --cfg-scale 3 --num-samples 500 \
    --save-images results/reproduced/cifar10-500
step judge-cifar10 python benchmarks/judge.py results/reproduced/cifar10-500 --data cifar10 --data-dir "$data" --class-labels all

# inside the trained networks
for model in dis diffussm mdm cunet; do
    step inside-$model python -m support.inside --ckpt assets/$model-mnist.pt --data-dir "$data" \
        --out assets/inside-$model.png
done

# words and moving shapes by MDM
mdm() { step "$1" python train.py --model mdm --name "$1" --sample-every 0 --results-dir $runs \
    "${@:2}"; }
words=(--preset mini --set t_normal=None --data shapes --cond text
    --hold-out "red star" "blue moon" "green heart" "yellow square" "purple ring")
mdm words-16 "${words[@]}" --image-size 16 --max-steps 1500
mdm words "${words[@]}" --image-size 32 --max-steps 1500 --init-inner $runs/words-16
step share-words python -m support.checkpoint $runs/words assets/words-mdm.pt
cp $runs/words/log.csv assets/words-mdm.csv
step draw-words python sample.py --ckpt assets/words-mdm.pt --num-samples 80 \
    --out assets/words-mdm.png --prompt "a small red star" "a big red star" "a small blue moon" "a big blue moon" \
    "a small green heart" "a big green heart" "a small yellow square" "a big yellow square" "a small purple ring" \
    "a big purple ring"
clips=(--preset tiny-video --data moving --cond text)
mdm moving-1x16 "${clips[@]}" --frames 1 --image-size 16 --max-steps 1500
mdm moving-8x16 "${clips[@]}" --global-batch-size 16 --image-size 16 --max-steps 1500 --init-inner $runs/moving-1x16
mdm moving "${clips[@]}" --global-batch-size 16 --image-size 32 --max-steps 400 --init-inner $runs/moving-8x16
step share-moving python -m support.checkpoint $runs/moving assets/moving-mdm.pt
cp $runs/moving/log.csv assets/moving-mdm.csv
step draw-moving python sample.py --ckpt assets/moving-mdm.pt --cfg-scale 1.5 --num-samples 8 \
    --out results/moving-mdm.png --prompt "a small red circle moving left" "a big green cross moving right" \
    "a small blue ring moving up" "a big purple heart moving down" "a small orange star moving right" \
    "a big yellow square moving up" "a small green moon moving down" "a big blue triangle moving left"
cp results/moving-mdm.gif assets/moving-mdm.gif

# speed and faults
for name in scan s4d memory kill processes; do step $name python benchmarks/$name.py; done
step step python benchmarks/step.py -- --data mnist --data-dir "$data"
for paper in dis diffussm mdm cunet; do step table-$paper python $paper.py; done
echo "all of it is there; this call took $((SECONDS / 60)) minutes"
