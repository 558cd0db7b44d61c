# mmsegmentation's own: 40,000 iterations, batch 8, as its deeplabv3_r101-d8_4xb2-40k_cityscapes-512x1024.
_base_ = "schedule_40k_b16.py"
batch_size = 8  # over all processes
optim_wrapper = dict(optimizer=dict(lr=0.01, weight_decay=5e-4))
param_scheduler = [dict(type="PolyLR", eta_min=1e-4, power=0.9, begin=0, by_epoch=False)]  # ends with the run
