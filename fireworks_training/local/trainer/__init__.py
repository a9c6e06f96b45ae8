"""The trainer: one trainer job, a process that owns the job's models and runs their operations.

Words: an *operation* is what a client submits (a pass, an optimizer step, a save, a load); a
model's operations stand in its *queue* in the order of `seq_id`; a *step* of training is the
operations up to and including one `optim_step`.

A pass's way, `forward_backward(data)` for instance:

1. **HTTP.** The gateway forwards the request to the worker's Unix socket (`worker.main`,
   `app.create_app`). The handler made by `app._submitter` reads the body and decompresses it.
2. **Wire.** `wire.json_codec.submission` or `wire.proto_codec.submission` decodes the body, in a
   thread if it is large. Both dialects hand `RawPass` and `RawDatum` to `wire.datums.make_pass`,
   which checks them against model and loss. A refusal becomes an operation that has failed already.
3. **Queue.** `service.TrainerService.submit` gives the operation its place in the model's
   `queue.line.ModelLine`, and the answer is the id of its result. `TrainerService.run` takes
   the models in turn: each time it asks the queue for the next operation (`ModelLine.advance`)
   and runs that on the torch thread (`run.torch_thread.TorchThread`).
4. **Run.** `run.execution.TrainedModel.execute` carries it out. For a pass, `run.passes.run_pass`
   lets `run.packing.plan` choose micro-batches that share prompts, `run.network.Network.compute`
   and `Network.logprobs` run the model on each, the loss (`local.model.losses`) gives a gradient,
   and `MasterAdamW.accumulate` adds it up.
5. **Back.** The operation's codec encodes the result, `ModelLine.succeed` keeps it, and
   `run.hosted.HostedModel.notify` wakes the polls: `/retrieve_future` for one result
   (`TrainerService.result`), `/retrieve_futures` for all that ended (`TrainerService.ended`).

A save of a snapshot leaves the queue early: its weights are copied on the torch thread
(`run.exports.SnapshotExports.capture`), and written on the export thread (`write`), while the next
operations run.

Knows one job. Does not know the gateway's resources, other jobs (but for loading their states) or
engines.
"""
