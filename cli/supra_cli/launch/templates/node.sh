run={{ job.run | shell }}
uptrain=(uptrain "$config" --out "$run"{% for setting in job.settings %} --set {{ setting | shell }}{% endfor %})

start() {
  exec torchrun --nproc-per-node={{ job.gpus }} --shutdown-timeout={{ job.grace - 30 }} \
{% if job.nodes > 1 %}
    --nnodes={{ job.nodes }} --rdzv-id={{ job.name }} --rdzv-backend=c10d \
    --rdzv-endpoint="$first:29500" --local-addr="$address" \
    --rdzv-conf="is_host=$((node == 0)),join_timeout=86400" \
{% else %}
    --standalone \
{% endif %}
    -m supra_cli "${uptrain[@]}"
}
{% if job.nodes > 1 %}
# Processes that join anew must not meet the address of those before them.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
{% endif %}

# Told to end, the job saves and exits with 75: start it again.
ending=
trap 'ending=yes; kill -TERM "$!"' TERM
leave() { exit 75; }

# The first node, where the others meet, decides when to give up; the others follow it.
decides=$((node == 0))
{% include "again.sh" %}
