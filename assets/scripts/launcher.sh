# shellcheck shell=bash
# What the launchers share. Each sets `root` (the repository) and `script` (what it starts), and sources this file above
# its settings; those that train call `train` below them.
launcher="$(realpath "${BASH_SOURCE[1]}")"

fail() {
  echo "error: $*" >&2
  exit 2
}

show_help() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$launcher"
  printf '\nSettings with their defaults:\n'
  sed -e '1,/^source /d' -e '/^# The settings end here/,$d' -e '/^export/d' \
    -e 's/^ *\([A-Z][A-Z0-9_]*\)="\${\1:\{0,1\}-\(.*\)}"/\1=\2/' "$launcher"
  echo "Flags of the script, which may follow the launcher's name: python $script --help"
}

for word in "$@"; do
  case "$word" in
    -h | --help)
      show_help
      exit
      ;;
    --config | --config=*)
      fail "--config: the settings of this launcher would override the file; pass it to the script itself, $script"
      ;;
  esac
done
for program in accelerate python python3; do
  command -v "$program" >/dev/null || fail "$program is not installed here; activate the environment of 'make install'"
done

# Ctrl-C reaches the script, too, which says how to continue. torchrun and accelerate add a traceback to that.
end_interrupted() {
  if [[ "${launch[0]:-}" == torchrun || "${launch[0]:-}" == accelerate ]]; then
    echo "interrupted; start the same command again to continue" >&2
  fi
  exit 130
}
trap end_interrupted INT

# Run accelerate so that Ctrl-C is left to the script (hear_ctrl_c in training/common/signals.py), once that has started.
without_ctrl_c() {
  local process status=0 interrupted=""
  "$@" <&0 & # background processes of bash ignore Ctrl-C
  process=$!
  trap 'interrupted=true; pgrep -P "$process" >/dev/null || { kill "$process" && echo interrupted >&2; }' INT
  while kill -0 "$process" 2>/dev/null; do
    wait "$process" 2>/dev/null && status=0 || status=$?
  done
  trap end_interrupted INT
  if [[ -n "$interrupted" ]]; then exit 130; fi
  return "$status"
}

# Let an old name set a setting: renamed OLD NEW
renamed() {
  if [[ -n "${!1:-}" ]]; then
    if [[ "${!2:-${!1}}" != "${!1}" ]]; then
      fail "$1=${!1} and $2=${!2} mean the same setting; unset $1, its old name"
    fi
    printf -v "$2" %s "${!1}"
    unset "$1"
  fi
}
renamed MODEL_ID MODEL_PATH
if [[ "$script" == */prepare_dataset.py ]]; then
  renamed DATA_ROOT CLIPS
  renamed OUTPUT_DIR PREPARED
else
  if [[ "${LOAD_TENSORS:-true}" == true ]]; then renamed DATA_ROOT PREPARED; else renamed DATA_ROOT CLIPS; fi
  renamed OUTPUT_DIR OUTPUT_ROOT
  renamed ACCELERATE_CONFIG_FILE ACCELERATE_CONFIG
fi
PYTHONPATH="$root/training" python3 "$root/assets/scripts/check_settings.py" "$launcher"

# Set `data`, the flags that name the raw clips.
name_clips() {
  if [[ -z "$DATASET_FILE$DATASET_NAME$DATASET_MIX" ]]; then
    CLIPS="${CLIPS:-clips}"
  fi
  data=(${CLIPS:+--data_root "$CLIPS"} ${DATASET_FILE:+--dataset_file "$DATASET_FILE"})
  data+=(${DATASET_NAME:+--dataset_name "$DATASET_NAME"} ${DATASET_MIX:+--dataset_mix "$DATASET_MIX"})
}

# Set NUM_GPUS, of each machine, from GPU_IDS or the old NUM_PROCESSES, of all machines: count_gpus MACHINES
count_gpus() {
  local name ids one="([0-9]+|(GPU|MIG)-[^ ,]+)"
  for name in NUM_GPUS NUM_MACHINES NUM_PROCESSES; do
    if [[ ! "${!name:-1}" =~ ^[1-9][0-9]*$ ]]; then fail "$name=${!name}: must be a whole number of 1 or more"; fi
  done
  if [[ -n "${NUM_PROCESSES:-}" ]]; then
    if ((NUM_PROCESSES % $1)); then fail "NUM_PROCESSES=$NUM_PROCESSES: $1 machines cannot share it equally"; fi
    NUM_PROCESSES="$((NUM_PROCESSES / $1))"
    renamed NUM_PROCESSES NUM_GPUS
  fi
  if [[ -n "$GPU_IDS" ]]; then
    IFS=", " read -ra ids <<<"$GPU_IDS"
    if [[ ! "$GPU_IDS" =~ ^$one([ ,]" "?$one)*$ || -n "$(printf "%s\n" "${ids[@]}" | sort | uniq -d)" ]]; then
      fail "GPU_IDS=$GPU_IDS: name each GPU once, as in GPU_IDS=\"0,1\", or set NUM_GPUS to their number"
    fi
    if [[ "${NUM_GPUS:-${#ids[@]}}" != "${#ids[@]}" ]]; then
      fail "GPU_IDS=\"$GPU_IDS\" names ${#ids[@]} GPUs, but the number is set to $NUM_GPUS; unset one of them"
    fi
    NUM_GPUS="${#ids[@]}"
    GPU_IDS="$(IFS=, && echo "${ids[*]}")"
    if [[ "${CUDA_VISIBLE_DEVICES:-$GPU_IDS}" != "$GPU_IDS" ]]; then
      fail "GPU_IDS=$GPU_IDS and CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES differ; unset one of them"
    fi
    export CUDA_VISIBLE_DEVICES="$GPU_IDS"
  fi
}

# Print a word or number of the accelerate config: in_config NAME
in_config() {
  sed -En "s/^$1: *[\"']?([[:alnum:]_]*).*/\1/p" "$ACCELERATE_CONFIG"
}

# Set ACCELERATE_CONFIG and CPU_THREADS if they are empty, and `launch`, the command that starts the script.
choose_launch() {
  local processes="" machines="" sharing precision on_cpu chosen=single_gpu
  if [[ -n "$ACCELERATE_CONFIG" ]]; then
    check_config
    machines="$(in_config num_machines)"
  fi
  machines="${NUM_MACHINES:-${machines:-1}}"
  count_gpus "$machines"
  if ((machines > 1)); then chosen=ddp_2_machines; elif ((${NUM_GPUS:-1} > 1)); then chosen=ddp; fi
  if [[ -z "$ACCELERATE_CONFIG" ]]; then
    ACCELERATE_CONFIG="$root/accelerate_configs/$chosen.yaml"
  elif [[ "$chosen" != single_gpu ]] && starts_one_process; then
    fail "ACCELERATE_CONFIG=$ACCELERATE_CONFIG starts one process, not $((${NUM_GPUS:-1} * machines)); unset it," \
      "or use accelerate_configs/$chosen.yaml"
  fi
  if [[ -n "$NUM_GPUS" ]]; then
    processes="$((NUM_GPUS * machines))"
  fi
  if [[ -z "$CPU_THREADS" ]]; then
    sharing="${processes:-$(in_config num_processes)}"
    CPU_THREADS="$(($(nproc) * machines / ${sharing:-1}))"
    CPU_THREADS="$((CPU_THREADS > 0 ? CPU_THREADS : 1))"
  fi
  if is_plain; then # accelerate would import torch first, and keep it in memory
    precision="$(in_config mixed_precision)" on_cpu="$(in_config use_cpu)"
    launch=(
      env "ACCELERATE_USE_CPU=${on_cpu:-false}" "ACCELERATE_MIXED_PRECISION=${precision:-no}"
      "OMP_NUM_THREADS=$CPU_THREADS" python "$root/$script"
    )
    return
  fi
  launch=(
    accelerate launch --quiet --config_file "$ACCELERATE_CONFIG" --num_cpu_threads_per_process "$CPU_THREADS"
    ${CUDA_VISIBLE_DEVICES+--gpu_ids all} # otherwise the file's gpu_ids would override the variable
    ${processes:+--num_processes "$processes"} ${NUM_MACHINES:+--num_machines "$NUM_MACHINES"}
    ${MACHINE_RANK:+--machine_rank "$MACHINE_RANK"} ${MAIN_PROCESS_IP:+--main_process_ip "$MAIN_PROCESS_IP"}
    ${MAIN_PROCESS_PORT:+--main_process_port "$MAIN_PROCESS_PORT"}
    "$root/$script"
  )
  if starts_one_process; then
    launch=(without_ctrl_c "${launch[@]}")
  fi
}

starts_one_process() {
  grep -Eq "^distributed_type: *[\"']?NO\b" "$ACCELERATE_CONFIG"
}

# Whether accelerate would only set three variables and start the script: for one process, with nothing else in the file.
is_plain() {
  local quote="[\"']?" plain
  plain="compute_environment: *LOCAL_MACHINE|mixed_precision: *$quote(no|fp16|bf16)$quote|use_cpu: *(true|false)"
  plain+="|gpu_ids: *all|machine_rank: *0|num_(machines|processes): *1|(debug|enable_cpu_affinity): *false|tpu_[a-z_]+:.*"
  plain+="|(distributed_type|downcast_bf16|main_training_function|rdzv_backend|same_network):.*"
  starts_one_process && ! grep -Evq "^(($plain) *)?(#.*)?$" "$ACCELERATE_CONFIG"
}

# Refuse a file that does not exist; some come from the original toolkit.
check_config() {
  local instead="the files are in accelerate_configs/"
  if [[ ! -f "$ACCELERATE_CONFIG" ]]; then
    case "$(basename "$ACCELERATE_CONFIG")" in
      uncompiled_1.yaml) instead="it is now accelerate_configs/single_gpu.yaml, the default" ;;
      uncompiled_*.yaml) instead="it is now accelerate_configs/ddp.yaml with NUM_GPUS" ;;
      compiled_*.yaml) instead="it is now the default file with the flag --compile" ;;
      deepspeed.yaml) instead="it is now accelerate_configs/zero2.yaml" ;;
    esac
    fail "ACCELERATE_CONFIG: no file '$ACCELERATE_CONFIG'; $instead"
  fi
}

# Whether flags leave the precision of the optimizer's states to the toolkit.
leaves_memory_open() {
  [[ " $* " == *" --memory_budget_gb"* || " $* " == *" --auto_fit "* ]]
}

# Add the flags of validation videos, if the setting NAME has what each needs besides its prompt: validate_with NAME
validate_with() {
  if [[ -n "${!1}" ]]; then
    flags+=(--validation_prompt "$VALIDATION_PROMPT" --validation_epochs "$VALIDATION_EPOCHS" "--${1,,}" "${!1}")
  else
    echo "$1 is empty: no videos are sampled"
  fi
}

# Train once for each combination of the sweep. Set before: `name` and `name_end`, the first and last part of the output
# folder's name, and `flags`, those that only this launcher passes.
train() {
  local learning_rate lr_schedule optimizer steps output_dir common runs=() result=pytorch_lora_weights.safetensors
  choose_launch
  if [[ -n "$CONTINUE" ]]; then
    continue_run "$@"
    return
  fi
  if [[ "$OUTPUT_ROOT" == "$PREPARED" ]]; then # OUTPUT_DIR may still be exported for an earlier prepare_dataset.sh
    fail "OUTPUT_ROOT=$OUTPUT_ROOT is the folder of the prepared data; set another one, and unset OUTPUT_DIR"
  fi
  case "$LOAD_TENSORS" in
    true) data=(--data_root "$PREPARED" --load_tensors) ;;
    false) name_clips && HEIGHT="${HEIGHT:-480}" WIDTH="${WIDTH:-720}" ;; # without them, the script uses many sizes
    *) fail "LOAD_TENSORS=$LOAD_TENSORS: must be true or false" ;;
  esac
  batch=(--train_batch_size "$TRAIN_BATCH_SIZE")
  if [[ " $* " == *" --max_tokens_per_batch"* ]]; then batch=(); fi # fills batches itself
  common=(
    --pretrained_model_name_or_path "$MODEL_PATH"
    "${data[@]}" --caption_column "$CAPTION_COLUMN" --video_column "$VIDEO_COLUMN"
    ${HEIGHT:+--height "$HEIGHT"} ${WIDTH:+--width "$WIDTH"}
    ${NUM_FRAMES:+--frame_buckets "$NUM_FRAMES" --max_num_frames "$NUM_FRAMES"}
    --mixed_precision "$MIXED_PRECISION"
    "${batch[@]}"
    --lr_warmup_steps "$LR_WARMUP_STEPS"
    --checkpointing_steps "$CHECKPOINTING_STEPS"
    --enable_slicing --enable_tiling
    --dataloader_num_workers 2 --pin_memory
    --allow_tf32
    --seed "$SEED"
    --report_to "$REPORT_TO"
  )
  if [[ "$script" == *_sft.py ]]; then
    result=transformer
    if [[ " $* " == *" --save_pipeline "* ]]; then result=pipeline; fi
  fi
  for learning_rate in $LEARNING_RATES; do
    for lr_schedule in $LR_SCHEDULES; do
      for optimizer in $OPTIMIZERS; do
        for steps in $MAX_TRAIN_STEPS; do
          output_dir="$OUTPUT_ROOT/${name}__$(basename "$MODEL_PATH")"
          output_dir+="__${optimizer}__${steps}-steps__${lr_schedule}__lr-$learning_rate$name_end"
          command=(
            "${launch[@]}" "${common[@]}" "${flags[@]}"
            --optimizer "$optimizer" --learning_rate "$learning_rate" --lr_scheduler "$lr_schedule"
            --max_train_steps "$steps" --output_dir "$output_dir"
          )
          echo "=== $output_dir"
          runs+=("$output_dir")
          if [[ -e "$output_dir/$result" ]]; then
            echo "has a finished run: skipped (to train it longer, set CONTINUE to this folder; to train again, set" \
              "another OUTPUT_ROOT)"
          elif compgen -G "$output_dir/checkpoint-*" >/dev/null; then
            "${command[@]}" --resume_from_checkpoint latest "$@"
          else
            "${command[@]}" "$@"
          fi
        done
      done
    done
  done
  if ((${#runs[@]} > 1)) && [[ -f "${runs[0]}/metrics.jsonl" ]]; then # not after --dry_run
    printf 'to compare the %d runs on one page:\npython %q' "${#runs[@]}" "$root/training/compare_runs.py"
    printf ' %q' "${runs[@]}" && echo
  fi
}

# Train the run in the folder CONTINUE up to MAX_TRAIN_STEPS, with its own flags.
continue_run() {
  local config
  config="$(compgen -G "$CONTINUE/config-step-*.yaml" | sort -V | tail -n 1 || true)"
  config="${config:-$CONTINUE/config.yaml}"
  if [[ ! -f "$config" ]]; then
    fail "CONTINUE=$CONTINUE: not the folder of a run, because it has no config.yaml"
  fi
  echo "=== $CONTINUE"
  "${launch[@]}" --config "$config" --output_dir "$CONTINUE" --resume_from_checkpoint latest \
    --max_train_steps "$MAX_TRAIN_STEPS" "$@"
}
