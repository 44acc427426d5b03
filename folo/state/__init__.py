"""The engine as a value: its state, and the pure functions from one state to the next.

Read the modules in this order:

1. The data. `sequence`: one continuation of one prompt. `engine`: EngineState, which holds the queues
   of sequences, the requests that they belong to and the accounting of blocks. `heap`: the physical blocks,
   shared by reference. `pool`: what one state uses of them, and the prefix index. `log`, `map`, `evolve`:
   the persistent list, the persistent map and the fast `replace` that these are built with.
2. How requests come and go. `lifecycle`: submit, finish, abort, collect. `queues`: their order.
3. One step. `batch`: a plan for it, which `schedule` makes. `bind`: the plan's blocks, with copies where
   histories part. `layout`: the arrays for the device. `advance`: what came back becomes the next state.
   `flight`: what changes if the host does not wait for the tokens.
4. What else can be done with a state. `branch`: fork, extend. `rebind`: other weights or limits. `outputs`,
   `stats`, `check`: look at it. `document`, `save`, `restore`: to a file, and back.
"""
