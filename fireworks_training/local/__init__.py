"""The embedded local platform: a gateway, a trainer worker a job, an engine worker a replica.

The rooms, from the bottom up (each imports only from those above it in this list):

- `limits`, `settings`: shortages that the platform imitates, and the settings of each process.
- `engine_frames`, `results`: formats that gateway and workers share: the engine's socket frames,
  and the log of finished requests behind batch polling.
- `store`: everything on disk: snapshots, deltas, retention, the resource database, checkpoints of
  the Tinker API.
- `model`: a causal language model in fp32: loading, rounding, adapters, losses, AdamW, memory, and
  promotion of a snapshot to a model directory.
- `processes`: supervisor, template and workers: who starts whom and who ends how.
- `engine`: one replica of a deployment: requests, batch, prefix cache, sampling, hot loads.
- `trainer`: one trainer job: HTTP, wire formats, the queue of operations, their execution.
- `gateway`: the HTTP server in front of all of them: authentication, control plane, inference, the
  Tinker API.
- `pretraining`, `pretrain`: how the small model that ships was made; not used at run time.

The walks of a request are told in `engine` ("a token's way"), `trainer` ("a pass's way") and
`processes` ("who starts whom").

Knows everything that the platform does. Nothing in the SDK imports it: clients start it as a
process (`python -m fireworks_training.local`) and talk HTTP to it.
"""
