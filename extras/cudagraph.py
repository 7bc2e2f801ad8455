"""A function of tensors as one CUDA graph: a single launch in place of hundreds.

A small network spends most of a step waiting for the host to launch kernels. On an H200 the default recipe
makes 25 steps per second launched one by one, and 249 as a graph (experiments/LOG.md).
"""
import torch


class Graphed:
    """call(*tensors) -> a tensor, captured once and then replayed. The first calls are plain ones, which
    compile and initialise: at least three, then until ready(). Inputs of another shape go to `call` itself.

    A replay reads and writes the memory of the capture and runs no Python. So everything that changes from
    call to call must be in tensors: a Python number keeps its value. `call` may not read a tensor's value.
    """

    def __init__(self, call, ready=lambda: True):
        self.call, self.ready, self.graph = call, ready, None
        self.shapes, self.plain_calls, self.stream = None, 0, torch.cuda.Stream()

    def aside(self, inputs):
        """A plain call on the stream that captures."""
        here = torch.cuda.current_stream()
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            output = self.call(*inputs)
        here.wait_stream(self.stream)
        return output

    def capture(self, inputs):
        self.inputs, graph = [value.clone() for value in inputs], torch.cuda.CUDAGraph()
        torch.clear_autocast_cache()            # the graph must contain its own casts of the weights
        try:                                    # thread_local: other threads load batches meanwhile
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.output = self.call(*self.inputs)
        except RuntimeError as error:
            error.add_note("this cannot be captured as a CUDA graph: use train.py --no-compile (its models "
                           "are sampled without one, too), or sample.open_pipeline(graph=False)")
            raise
        torch.clear_autocast_cache()
        self.graph = graph

    def __call__(self, *inputs):
        shapes = [value.shape for value in inputs]
        if self.graph is None:
            if shapes != self.shapes:
                self.shapes, self.plain_calls = shapes, 0
            if self.plain_calls < 3 or not self.ready():
                self.plain_calls += 1
                return self.aside(inputs)
            self.capture(inputs)
        if shapes != self.shapes:
            return self.call(*inputs)
        for mine, value in zip(self.inputs, inputs):
            mine.copy_(value)
        self.graph.replay()
        return self.output.clone()
