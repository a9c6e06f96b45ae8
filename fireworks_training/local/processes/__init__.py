"""The platform's processes: who starts whom, and who ends how.

Started, from the outermost in:

1. A client with `base_url="local"`, or `fireworks-training serve`, starts
   `python -m fireworks_training.local`, which reads one line of settings and becomes the
   **supervisor** (`supervisor.supervise`). It makes the runtime folder
   (`lifetime.make_runtime_dir`), locks the state folder, binds the TCP socket and the template's
   Unix socket, and opens the lifetime pipe, whose write end nobody else ever gets.
2. The supervisor starts two children (`supervisor.Child.start`): the **gateway**
   (`local.gateway.__main__`), which takes over the TCP socket, and the **template**
   (`template.main`), which imports torch once (`template.preload`) and then waits for requests.
   It prints the ready line (`report.ready_text`) when both answer.
3. The gateway asks the template for a **worker** over the Unix socket: `Template.spawn` forks, or
   starts a new interpreter where `worker_start` is "exec". The child runs `worker_entry.run`, which
   calls the entry point of its kind: `local.trainer.worker.main` or `local.engine.worker.main`.

Ended:

- A process that dies by itself: gateway and template are restarted by the supervisor after a delay
  (`restarts.RestartPolicy`), and after too many quick deaths the platform ends. A worker is reaped
  by the template; the gateway sees its connection close, reads `worker_entry.failure_reason` and
  decides what that means for its job or deployment.
- One worker on purpose: the gateway asks for a signal (`Template.kill`).
- All of them: the supervisor closes the lifetime pipe (`Supervisor._end`), or dies, which closes it
  too. Gateway and template read the EOF in their own loops and clean up, the template by ending its
  children (`Template.end_children`); in a worker a thread reads it (`lifetime.end_with_pipe`),
  sends SIGTERM, and ends the process by force after a grace. Whoever gets the exclusive lock of the
  runtime folder last removes it (`lifetime.remove_when_last`).

Knows processes and their settings. Does not know jobs, deployments, models or HTTP routes.
"""
