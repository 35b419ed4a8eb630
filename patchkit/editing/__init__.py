"""From facts to weight updates.

recipe        the configuration of an edit
contexts      texts that facts are edited in, which turn each fact into rows of tokens (`editor.requests_of`)
values        the value optimizer: rows -> target states; `suffixes` runs it on the suffixes alone
keys          keys and current states at the subject's last token, read site by site
gradients     the loss of facts' targets and its gradients, for methods without values
state         the edit history of each site, what goes on to the next run, and the record of one run
session       what the batches of a run share: the plan, the problem at a site, the solve
value_edits   a batch toward values: `ValueTargets` finds them, `ValueEdits` makes keys, residuals and solves of them
loss_edits    a batch from the loss itself
editor        the loop over batches
"""
