# CamVid laid out like Cityscapes: 367 images to train on, 101 to evaluate on, 240 x 180 pixels, 11 classes that carry
# Cityscapes' train ids, so that its 19 heads read it as it is.
_base_ = "cityscapes.py"
data_root = "data/camvid"
crop_size = (96, 128)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=(240, 180), ratio_range=(0.5, 1.5), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(num_workers=0, dataset=dict(dataset=dict(pipeline=train_pipeline)))
val_dataloader = dict(num_workers=0, dataset=dict(dataset=dict(pipeline=test_pipeline)))
batch_size = 4
optim_wrapper = dict(
    type="OptimWrapper",
    constructor="DistillationOptimWrapperConstructor",
    optimizer=dict(type="SGD", lr=0.03, momentum=0.9, weight_decay=1e-4),
)
param_scheduler = [dict(type="PolyLR", eta_min=0.0, power=0.9, begin=0, by_epoch=False)]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=750, val_interval=250)
