"""What a run says about itself: metrics, progress, time, memory."""

from spmd_train.observe.clock import StepClock as StepClock
from spmd_train.observe.examples import log_examples as log_examples
from spmd_train.observe.examples import read_examples as read_examples
from spmd_train.observe.flops import device_peak_flops as device_peak_flops
from spmd_train.observe.flops import mfu as mfu
from spmd_train.observe.flops import model_flops_per_token as model_flops_per_token
from spmd_train.observe.goodput import Goodput as Goodput
from spmd_train.observe.heartbeat import Heartbeat as Heartbeat
from spmd_train.observe.jsonl import JsonlWriter as JsonlWriter
from spmd_train.observe.jsonl import read_jsonl as read_jsonl
from spmd_train.observe.memory import device_memory_bytes as device_memory_bytes
from spmd_train.observe.memory import host_bytes as host_bytes
from spmd_train.observe.progress import Progress as Progress
from spmd_train.observe.stragglers import Stragglers as Stragglers
from spmd_train.observe.writers import MetricWriter as MetricWriter
from spmd_train.observe.writers import TensorBoardWriter as TensorBoardWriter
from spmd_train.observe.writers import WandbWriter as WandbWriter
from spmd_train.observe.writers import Writers as Writers
from spmd_train.observe.writers import check_writers as check_writers
from spmd_train.observe.writers import make_writers as make_writers
