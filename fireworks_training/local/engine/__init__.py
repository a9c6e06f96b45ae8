"""The engine: one replica of a deployment, a process that decodes many completions together.

Words: a *request* is what the gateway asks for; its *stream* is the id under which its tokens come
back. A running stream holds a *slot* (its place in the batch's arrays) and, once its prompt is
read, a *row* of a *lane*: rows of one lane have about equally long prompts, and attend in one call.
A *step* is one forward pass that gives each row one more token.

A token's way:

1. **A request arrives.** `worker.main` loads the weights, listens on a Unix socket and runs
   `worker.serve`; `_Connection` reads frames (`engine_frames.FrameDecoder`) between two steps and
   gives each control to `core.Engine.control`. An `add` is checked by `requests.parse_add`, and
   refused by a frame where it does not fit.
2. **It waits** in the engine's queue. Each `Engine.tick` admits the oldest requests
   (`Engine._admit`) while a slot, cache memory and prompt tokens of the next step are left.
3. **It gets a slot**: `batch.RunningBatch.add` enters it into the arrays of `slots.SlotTable`, and
   looks its prompt up in the prefix cache (`prompts.PromptStore`). A prompt that is known, or that
   another stream is just having read, is not computed again.
4. **Its prompt is read in pieces** (`attention.PromptPiece`), each as long as the step's budget of
   prompt tokens allows, so that running streams do not wait for a long prompt.
5. **Decoding steps.** `RunningBatch.step` packs the last token of every row and the pieces of
   prompts into one `attention.ForwardPass`; `decoder.Decoder.hidden` runs the model
   (`fused.FusedBody` where the family is known), in which `lanes.Lane` attends for its rows. From
   the hidden states `Decoder.logits` and `sampling.sample` make one token a stream;
   `SlotTable.advance` decides who is finished. A stream that began joins a lane (`Lane.join`);
   streams with the same prompt share one copy of it.
6. **A frame goes out.** The step's tokens, one a stream, become one frame (`Engine._queue_step`),
   after a frame about the streams that began, and frames of prompt logprobs (`probes`) where a
   request wanted them. `_Connection` sends them; when too much is unsent, the engine pauses.
7. **Cancel.** `Engine.cancel` takes streams out of the queue or the batch: the slot is free, and
   the row gone, before the next step.
8. **Hot load, between two steps.** `loads.SnapshotLoads` has `weights.WeightSet.prepare` read and
   verify the snapshot in a thread; `WeightSet.swap` copies it into the model when the transition
   allows it, `RunningBatch.weights_changed` empties the prefix cache, and prompts that were being
   read are read again.

Knows requests in token ids. Does not know text, HTTP, users or deployments.
"""
