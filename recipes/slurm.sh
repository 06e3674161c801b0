#!/usr/bin/env bash
# Slurm：两台机器，每台 8 张 GPU；没训练完就被停下时，排队接着跑
# Slurm: two machines of 8 GPUs each; a run that was stopped before its end queues again and goes on
#
#   sbatch recipes/slurm.sh my-run recipes/llama2_7b_fsdp.yaml
#   sbatch recipes/slurm.sh my-run recipes/llama2_7b_fsdp.yaml --epochs 2 --save-every 200
#
# 第一个参数是输出目录，第二个是配方，其余与 chatfine train 相同。仓库、模型、数据和输出目录都要在
# 各台机器都能看到的文件夹里。下面几行 #SBATCH 按自己的集群改（分区、账号、GPU 数、时间）。
# The first word is the output folder, the second the recipe, the others are those of chatfine train.
# Repository, model, data and output must lie where all machines see them. Change the #SBATCH lines
# to suit your cluster (partition, account, number of GPUs, time).
#
# 时间快到时 Slurm 先发 SIGTERM：训练做完手上的小批次，保存，退出。torchrun 只等 30 秒，模型大就用
# --save-every 多存几次（torchrun --help 里有 --shutdown-timeout 的话也可以加长）。
# Before the time is over Slurm sends SIGTERM: the run finishes its micro-batch, saves and ends.
# torchrun waits only 30 seconds for that, so save a large model more often with --save-every (or
# give torchrun a longer --shutdown-timeout if its --help knows one).
#
#SBATCH --job-name=chatfine
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=chatfine-%j.log

set -u
if [ "$#" -lt 2 ]; then
  echo "用法 usage: sbatch recipes/slurm.sh RUN RECIPE.yaml [--flags]" >&2
  exit 2
fi
run=$1 recipe=$2
shift 2

if [ -f "$run/config.yaml" ]; then
  words=(resume "$run")
else
  words=(train "$recipe" --output "$run" "$@")
fi

newest() { ls -d "$run"/checkpoints/step-* 2>/dev/null | tail -n 1; }
before=$(newest)

# 一台机器一个 torchrun，在第一台机器上碰头；端口按作业号错开
# one torchrun on each machine; they meet on the first one, at a port that depends on the job
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 torchrun \
  --nnodes "$SLURM_NNODES" --nproc_per_node "$SLURM_GPUS_ON_NODE" \
  --rdzv_backend c10d --rdzv_endpoint "$head:$((20000 + SLURM_JOB_ID % 20000))" \
  --rdzv_id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
  -m chatfine "${words[@]}"

if [ -f "$run/result.json" ]; then
  exit 0
fi
# 有新的检查点才重排，一开始就出错的训练不会无限重来
# only a run that got on queues again; one that fails at its start does not come back for ever
if [ "$(newest)" != "$before" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit 1
