# As the literature on distillation for segmentation (CIRKD), and most likely Table 5: 40,000 iterations, batch 16.
batch_size = 16  # over all processes
optim_wrapper = dict(
    type="OptimWrapper",
    constructor="DistillationOptimWrapperConstructor",
    optimizer=dict(type="SGD", lr=0.02, momentum=0.9, weight_decay=1e-4),
)
param_scheduler = [dict(type="PolyLR", eta_min=0.0, power=0.9, begin=0, by_epoch=False)]  # ends with the run
train_cfg = dict(type="IterBasedTrainLoop", max_iters=40000, val_interval=4000)
