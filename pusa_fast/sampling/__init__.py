"""From a request to latents: the schedule matrix, the task that fills it, and the loop over it."""
