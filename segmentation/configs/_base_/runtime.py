# How a run is watched, saved and resumed. Stock hooks that read losses from the device at every step are left out.
default_scope = "mmseg"
custom_imports = dict(
    imports=["segmentation.distiller", "segmentation.data", "segmentation.evaluation"], allow_failed_imports=False
)
seed = 0
run = dict(
    log_every=50,  # iterations between lines of metrics
    save_every=None,  # iterations between checkpoints besides those that follow each evaluation
    keep=2,  # checkpoints besides the best
    select="student/mIoU",  # what makes a checkpoint the best
    trackers=["tensorboard"],  # where metrics go besides the run folder's own files; [] for nowhere
)
default_hooks = dict(
    runtime_info=None,
    timer=None,
    sampler_seed=None,
    logger=None,
    checkpoint=None,
    param_scheduler=dict(type="ParamSchedulerHook"),
)
env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)
visualizer = dict(type="Visualizer", vis_backends=[])  # e.g. [dict(type="WandbVisBackend")]
log_level = "ERROR"  # of mmengine's own log
val_cfg = dict(type="ValLoop")
val_evaluator = [dict(type="NetworkIoU", role="teacher"), dict(type="NetworkIoU", role="student")]
