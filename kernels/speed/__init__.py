"""Speed of operations on a GPU: `ham kernels bench --device cuda`.

Method.

1. **Compare.** Before a provider is timed, its outputs and every gradient are compared with the
   truth on exactly the tensors that are then timed, at the full shape (`truth.py`: float64,
   computed slice by slice). What computes the truth is itself compared with the token-by-token
   reference at small shapes in the same process. A provider that fails is not timed, unless
   `--time-wrong-peer` asks for it; then its rows say `correct: false` and by how much it is off.
2. **Time** (`clock.py`). Providers take turns, round by round, so that a busy moment or a change
   of clock frequency hits all of them. Before each call a buffer five times as large as the L2
   cache of an H100 is overwritten, so that inputs come from memory; the overwriting lies outside
   the timed region. Reported is the median with the 20th and 80th percentile. `eager` rows time
   the call as a user makes it, `cuda_graph` rows the replay of its graph, without launch costs.
3. **Modes.** `forward`: gradients switched off. `forward_saving`: gradients on, so that whatever
   the backward needs is kept. `forward_backward`: both, the gradient entering at the read-out.
4. **Floors** (`ceilings.py`). max(FLOPs / matmul rate, bytes / copy rate), with rates measured in
   the same run, FLOPs of the algorithm, and bytes if each input is read once and each output
   written once.

Every cell gives rows: times, peak extra memory, errors; a cell that could not be run gives a row
with the reason. Rows are stored after each group of cells, and a second run with the same file
leaves out what is finished.
"""
