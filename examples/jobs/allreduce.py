"""Data-parallel training without a framework: what `torchrun` and `mpirun` programs do, in plain Python.

Each rank of the gang has its part of the data, computes a gradient, and all ranks add theirs up by a ring
all-reduce. Rank 0 writes a checkpoint when it is told to stop, and into the output when it is done; a gang that
was paused goes on from it.

    larder submit ring --processes 4 -g 1 --output model:/out -- python3 examples/jobs/allreduce.py

A program of torch's own finds the same variables: `torch.distributed.init_process_group("nccl")` needs no more
than MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE, one of MPI's takes LARDER_HOSTFILE.
"""

import json
import os
import signal
import socket
import struct
import sys
import time

RANK = int(os.environ["RANK"])
SIZE = int(os.environ["WORLD_SIZE"])
MASTER = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
STEPS = int(os.environ.get("STEPS", "200"))
CHECKPOINT = "checkpoint.json"


def receive(sock, size):
    parts = bytearray()
    while len(parts) < size:
        part = sock.recv(size - len(parts))
        if not part:
            raise ConnectionError("a rank has gone")
        parts += part
    return bytes(parts)


def send_text(sock, text):
    raw = text.encode()
    sock.sendall(struct.pack("!I", len(raw)) + raw)


def receive_text(sock):
    (size,) = struct.unpack("!I", receive(sock, 4))
    return receive(sock, size).decode()


def dial(address):
    """Connects to somebody who may not listen yet."""
    while True:
        try:
            return socket.create_connection(address, timeout=600)
        except ConnectionRefusedError:
            time.sleep(0.05)


def rendezvous(own):
    """Everybody tells rank 0 where to be found, and learns where the others are."""
    if RANK != 0:
        with dial(MASTER) as master:
            send_text(master, json.dumps([RANK, own]))
            return json.loads(receive_text(master))
    places, callers = {0: own}, []
    with socket.create_server(MASTER) as server:
        while len(places) < SIZE:
            caller, _ = server.accept()
            rank, place = json.loads(receive_text(caller))
            places[rank] = place
            callers.append(caller)
    ring = [places[rank] for rank in range(SIZE)]
    for caller in callers:
        send_text(caller, json.dumps(ring))
        caller.close()
    return ring


class Ring:
    """Each rank sends to the next one and receives from the one before it."""

    def __init__(self):
        listener = socket.create_server((MASTER[0], 0))
        ring = rendezvous(list(listener.getsockname()[:2]))
        self.next = dial(tuple(ring[(RANK + 1) % SIZE]))
        self.before, _ = listener.accept()

    def total(self, values):
        """Gives the sum over all ranks, the same bits on each: it is added up in the order of the ranks."""
        own = struct.pack(f"!{len(values)}d", *values)
        parts, passing = {RANK: own}, own
        for step in range(1, SIZE):
            self.next.sendall(passing)
            passing = receive(self.before, len(own))
            parts[(RANK - step) % SIZE] = passing
        columns = zip(*(struct.unpack(f"!{len(values)}d", parts[rank]) for rank in range(SIZE)))
        return [sum(column) for column in columns]


def data():
    """This rank's part of the points of y = 3 x + 2."""
    return [(x / 100, 3 * x / 100 + 2) for x in range(RANK, 100, SIZE)]


def main():
    stopping = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    ring, points = Ring(), data()
    step, a, b = 0, 0.0, 0.0
    if os.path.exists(CHECKPOINT):
        with open(CHECKPOINT, encoding="utf-8") as file:
            step, a, b = json.load(file)
        print(f"rank {RANK} goes on at step {step}", flush=True)
    while step < STEPS:
        errors = [a * x + b - y for x, y in points]
        gradient = [sum(error * x for error, (x, _) in zip(errors, points)), sum(errors), float(bool(stopping))]
        slope, offset, told = ring.total(gradient)
        a, b, step = a - slope / 100, b - offset / 100, step + 1
        if RANK == 0:
            progress = os.environ["LARDER_PROGRESS"]
            with open(progress + ".new", "w", encoding="utf-8") as file:
                file.write(f"step {step} of {STEPS}\n")
            os.replace(progress + ".new", progress)
        # All ranks stop behind the same step: each heard from the others who was told to.
        if told:
            if RANK == 0:
                with open(CHECKPOINT + ".new", "w", encoding="utf-8") as file:
                    json.dump([step, a, b], file)
                os.replace(CHECKPOINT + ".new", CHECKPOINT)
            sys.exit(1)
        time.sleep(float(os.environ.get("PAUSE", "0")))
    print(f"rank {RANK} of {SIZE}: y = {a:.3f} x + {b:.3f}", flush=True)
    if RANK == 0 and "LARDER_OUTPUT_MODEL" in os.environ:
        with open(os.path.join(os.environ["LARDER_OUTPUT_MODEL"], "weights.json"), "w", encoding="utf-8") as file:
            json.dump({"a": round(a, 9), "b": round(b, 9), "ranks": SIZE}, file)


main()
