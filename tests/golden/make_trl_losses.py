# ruff: noqa
# fmt: off
"""Makes trl_losses.json by EXECUTING TRL's own loss methods (not a re-implementation), in float64, on inputs in closed form.

Origin of the numbers: huggingface/trl 1.10.0.dev0 (July 2026; later versions have no PPO trainer). This script is kept as
it ran, so that each row can be traced to the call that made it; nothing imports it. `fixture.py` holds the same inputs
for the tests. To run it, put a TRL 1.10 checkout on PYTHONPATH, with torch and transformers:
python make_trl_losses.py out.json
"""


import json, sys, math, types
from collections import defaultdict
from types import SimpleNamespace as NS
import torch
torch.set_default_dtype(torch.float64)
import contextlib

V=7
def grid_logits(B,T,kind):
    b=torch.arange(B).view(B,1,1).double(); t=torch.arange(T).view(1,T,1).double(); v=torch.arange(V).view(1,1,V).double()
    f=1.3*b+0.7*t+0.5*v+0.1*b*v
    return 2*torch.sin(f) if kind=="pol" else 2*torch.cos(0.9*f+0.3) if kind=="ref" else 2*torch.sin(f+0.15)
def ids(B,T):
    b=torch.arange(B).view(B,1); t=torch.arange(T).view(1,T)
    return (3*b+2*t+(t*t)%5)%V
class M(torch.nn.Module):
    def __init__(s,lg): super().__init__(); s.lg=torch.nn.Parameter(lg); s.is_gradient_checkpointing=False; s.config=NS()
    def forward(s,**k):
        return NS(logits=s.lg.clone(), aux_loss=None)
class Acc:
    device=torch.device("cpu"); num_processes=1; sync_gradients=True; process_index=0; is_main_process=True
    def gather(s,x): return x
    gather_for_metrics=gather
    def reduce(s,x,reduction="sum"): return x
    def unwrap_model(s,m): return m
    def pad_across_processes(s,x,dim=0,pad_index=0): return x
out={}
def metrics(): return {"train":defaultdict(list),"eval":defaultdict(list)}

# ---------------- DPO ----------------
from trl.trainer.dpo_trainer import DPOTrainer
B,T=8,8   # rows 0..3 chosen; 4..7 rejected ; prompt length 2 ; completion lengths below
CL=json.loads(__import__("os").environ.get("CL","[1,5,3,6,2,2,6,4]"))
cm=torch.tensor([[0,0]+[1]*n+[0]*(6-n) for n in CL])
am=(torch.arange(T).view(1,T) < (torch.tensor(CL)+2).view(-1,1)).long()
def dpo(loss_type, beta=0.1, f32=False, ls=0.0, fdiv="reverse_kl", falpha=0.5, ld=None, wpo=False, tau=0.05, weights=None):
    c=(lambda x:x.float()) if f32 else (lambda x:x)
    pol,ref=M(c(grid_logits(B,T,"pol"))),M(c(grid_logits(B,T,"ref")))
    self=NS(model=pol,ref_model=ref,accelerator=Acc(),beta=beta,precompute_ref_logps=False,
        loss_types=loss_type if isinstance(loss_type,list) else [loss_type],loss_weights=weights or [1.0]*(len(loss_type) if isinstance(loss_type,list) else 1),
        ld_alpha=ld,f_divergence_type=fdiv,f_alpha_divergence_coef=falpha,label_smoothing=ls,use_weighting=wpo,aux_loss_enabled=False,
        args=NS(discopop_tau=tau,gradient_checkpointing_kwargs=None),_metrics=metrics(),_total_train_tokens=0)
    loss=DPOTrainer._compute_loss(self,pol,dict(input_ids=ids(B,T),attention_mask=am,completion_mask=cm),False)
    loss.backward()
    return loss.item(), pol.lg.grad.norm().item(), {k:v[-1] for k,v in self._metrics["train"].items()}
d={}
for lt in ["sigmoid","hinge","ipo","nca_pair","bco_pair","sppo_hard","aot","aot_unpaired","apo_zero","apo_down","discopop","sft","sigmoid_norm"]:
    l,g,m=dpo(lt); d[lt]=[l,g]
    if lt=="sigmoid": out["dpo_metrics"]=m
d["exo_pair ls=1e-3"]=list(dpo("exo_pair",ls=1e-3)[:2]); d["robust ls=0.1"]=list(dpo("robust",ls=0.1)[:2])
d["aot ls=0.1"]=list(dpo("aot",ls=0.1)[:2])
for f in ["forward_kl","js_divergence","alpha_divergence"]: d[f"sigmoid f={f}"]=list(dpo("sigmoid",fdiv=f,f32=f=="alpha_divergence")[:2])
d["sigmoid ld_alpha=0.5"]=list(dpo("sigmoid",ld=0.5)[:2]); d["sigmoid wpo"]=list(dpo("sigmoid",wpo=True)[:2])
d["sigmoid+bco_pair+sft w=.8,.2,1"]=list(dpo(["sigmoid","bco_pair","sft"],weights=[.8,.2,1.])[:2])
out["dpo"]=d

# ---------------- KTO ----------------
from trl.trainer.kto_trainer import KTOTrainer
def kto(lt,dw=1.,uw=1.,swap=False):
    pol,ref=M(grid_logits(B,T,"ref" if swap else "pol")),M(grid_logits(B,T,"pol" if swap else "ref"))
    self=NS(model=pol,ref_model=ref,accelerator=Acc(),beta=0.1,loss_type=lt,calculate_KL=lt=="kto",use_liger_kernel=False,precompute_ref_logps=False,
       desirable_weight=dw,undesirable_weight=uw,aux_loss_enabled=False,args=NS(gradient_checkpointing_kwargs=None),_metrics=metrics(),_total_train_tokens=0)
    # KL branch: same logits module but scored on rolled completions (prompt 2 tokens + previous row's completion)
    I=ids(B,T); KLI=I.clone(); KLI[:,2:]=I.roll(1,0)[:,2:]; KLM=cm.roll(1,0)
    self._compute_kl_logps=types.MethodType(KTOTrainer._compute_kl_logps,self)
    batch=dict(input_ids=I,attention_mask=am,completion_mask=cm,label=torch.tensor([True,False,True,False,False,True,True,False]),
       KL_input_ids=KLI,KL_attention_mask=am,KL_completion_mask=KLM)
    l=KTOTrainer._compute_loss(self,pol,batch,False); l.backward()
    return [l.item(),pol.lg.grad.norm().item(),self._metrics["train"]["kl"][-1]]
out["kto"]={"kto":kto("kto"),"kto (pol<->ref swapped)":kto("kto",swap=True),"kto swapped dw=1.33":kto("kto",dw=1.33,swap=True),"apo_zero_unpaired":kto("apo_zero_unpaired")}

# ---------------- GRPO ----------------
from trl.trainer.grpo_trainer import GRPOTrainer
P,C=3,5; G=4
advs=torch.tensor([1.2,-0.7,0.4,-0.9])
gm=torch.tensor([[1,1,1,1,1],[1,1,1,0,0],[1,1,0,0,0],[1,1,1,1,0]])
def logps(kind,temp=1.0):
    lg=grid_logits(G,P+C,kind)/temp; I=ids(G,P+C)
    lp=lg[:,:-1].log_softmax(-1).gather(-1,I[:,1:,None])[...,0]
    return lp[:,-C:]
def grpo(loss_type="dapo",beta=0.0,level="token",eps=0.2,eps_hi=None,delta=None,old=True,temp=1.0,q=1.0,ent=0.0,offm=None,bias=False,gas=1,items=None,maxlen=8,isr=None):
    pol=M(grid_logits(G,P+C,"pol")); pol.train()
    eh=eps if eps_hi is None else eps_hi
    self=NS(model=pol,accelerator=Acc(),model_kwarg_keys=set(),temperature=temp,_entropy_bonus_enabled=ent!=0.0,top_entropy_quantile=q,
        off_policy_mask_threshold=offm,importance_sampling_level=level,beta=beta,loss_type=loss_type,epsilon_low=eps,epsilon_high=eh,
        use_vllm=isr is not None,vllm_importance_sampling_correction=isr is not None,aux_loss_enabled=False,current_gradient_accumulation_steps=gas,
        max_completion_length=maxlen,entropy_coef=ent,use_adaptive_entropy=False,_metrics=metrics(),
        args=NS(delta=delta,use_bias_correction_kl=bias,sapo_temperature_pos=1.0,sapo_temperature_neg=1.05,vespo_k_pos=2.0,vespo_lambda_pos=3.0,vespo_k_neg=3.0,vespo_lambda_neg=2.0))
    for n in ["_get_per_token_logps_and_entropies","get_high_entropy_mask"]:
        f=getattr(GRPOTrainer,n); f=getattr(f,"__wrapped__",f); setattr(self,n,types.MethodType(f,self))
    self.get_off_policy_mask=GRPOTrainer.get_off_policy_mask; self.get_gamma_weights=GRPOTrainer.get_gamma_weights
    I=ids(G,P+C)
    inp=dict(prompt_ids=I[:,:P],prompt_mask=torch.ones(G,P,dtype=torch.long),completion_ids=I[:,P:],completion_mask=gm,advantages=advs,
        num_items_in_batch=torch.tensor(float(items or gm.sum())))
    if old: inp["old_per_token_logps"]=logps("old",temp)
    if beta: inp["ref_per_token_logps"]=logps("ref",temp)
    if isr is not None: inp["importance_sampling_ratio"]=isr
    l=GRPOTrainer._compute_loss(self,pol,inp); l.backward()
    return [l.item(),pol.lg.grad.norm().item()],{k:v[-1] for k,v in self._metrics["train"].items()}
g={}
for lt in ["grpo","bnpo","dr_grpo","dapo","cispo","sapo","vespo"]:
    kw=dict(eps_hi=5.0) if lt=="cispo" else {}
    g[lt],m=grpo(lt,**kw)
    if lt=="grpo": out["grpo_metrics(beta=0)"]=m
g["luspo (sequence)"],_=grpo("luspo",level="sequence")
g["grpo sequence(GSPO)"],_=grpo("grpo",level="sequence"); g["dapo sequence"],_=grpo("dapo",level="sequence")
g["grpo sequence eps=.03"],_=grpo("grpo",level="sequence",eps=0.03)
g["grpo on-policy(old=None)"],_=grpo("grpo",old=False)
g["grpo beta=0.04"],m=grpo("grpo",beta=0.04); out["grpo_metrics(beta=.04)"]=m
g["grpo beta=0.04 bias_corr_kl"],_=grpo("grpo",beta=0.04,bias=True)
g["dapo eps=.2 eps_high=.28"],_=grpo("dapo",eps_hi=0.28)
g["grpo eps=.05"],_=grpo("grpo",eps=0.05)
g["grpo eps=.05 delta=1.1"],_=grpo("grpo",eps=0.05,delta=1.1)
g["grpo temp=0.7"],_=grpo("grpo",temp=0.7)
g["grpo top_entropy_quantile=0.2"],_=grpo("grpo",q=0.2)
g["grpo entropy_coef=0.01"],_=grpo("grpo",ent=0.01)
g["dapo entropy_coef=0.01"],_=grpo("dapo",ent=0.01)
g["grpo off_policy_mask=0.01"],_=grpo("grpo",offm=0.01)
g["grpo gas=2"],_=grpo("grpo",gas=2); g["dapo items=28 gas=2"],_=grpo("dapo",gas=2,items=28)
out["grpo"]=g
out["grpo_logps_row0"]={"pol":logps("pol")[0].tolist(),"old":logps("old")[0].tolist(),"ref":logps("ref")[0].tolist()}
# GSPO-token, GMPO
import trl.experimental.gspo_token.grpo_trainer as _gt, trl.experimental.gmpo.gmpo_trainer as _gm
_orig=GRPOTrainer._compute_loss
GRPOTrainer._compute_loss=_gt.GRPOTrainer._compute_loss; out["grpo"]["gspo_token sequence_token, loss_type=grpo"]=grpo("grpo",level="sequence_token")[0]
_gmc=[c for n,c in vars(_gm).items() if n=="GMPOTrainer"][0]
GRPOTrainer._compute_loss=_gmc._compute_loss; out["grpo"]["gmpo eps=.4"]=grpo("grpo",eps=0.4)[0]; out["grpo"]["gmpo eps=.08"]=grpo("grpo",eps=0.08)[0]
GRPOTrainer._compute_loss=_orig
# ---------------- RLOO ----------------
from trl.trainer.rloo_trainer import RLOOTrainer
def rloo(eps=0.2):
    pol=M(grid_logits(G,P+C,"pol")); pol.train()
    self=NS(model=pol,accelerator=Acc(),model_kwarg_keys=set(),temperature=1.0,aux_loss_enabled=False,epsilon_low=eps,epsilon_high=eps,_metrics=metrics(),_entropy_bonus_enabled=False)
    f=RLOOTrainer._get_per_token_logps_and_entropies; f=getattr(f,"__wrapped__",f)
    self._get_per_token_logps_and_entropies=types.MethodType(f,self)
    I=ids(G,P+C)
    l=RLOOTrainer._compute_loss(self,pol,dict(prompt_ids=I[:,:P],prompt_mask=torch.ones(G,P,dtype=torch.long),completion_ids=I[:,P:],completion_mask=gm,advantages=advs,old_logps=(logps("old")*gm).sum(1)))
    l.backward(); return [l.item(),pol.lg.grad.norm().item()]
out["rloo"]={"eps=.2":rloo(),"eps=.05":rloo(.05)}
# ---------------- ORPO / CPO / SimPO ----------------
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.experimental.cpo.cpo_trainer import CPOTrainer
cw=torch.tensor([-0.8,-1.5,-0.3]); rj=torch.tensor([-1.1,-0.9,-2.0])
r=ORPOTrainer.odds_ratio_loss(NS(beta=0.1,accelerator=Acc()),cw,rj)
out["orpo cw=[-.8,-1.5,-.3] rj=[-1.1,-.9,-2] beta=.1"]={"beta*logsigmoid(log_odds)":r[0].tolist(),"mean_ratio":r[3].item(),"mean_log_odds":r[4].item()}
def cpo(lt,**k):
    a=dict(beta=0.1,alpha=0.0,simpo_gamma=0.5,label_smoothing=0.0,loss_type=lt,accelerator=Acc()); a.update(k)
    return CPOTrainer.cpo_loss(NS(**a),cw,rj)[0].mean().item()
out["cpo cw,rj as orpo beta=.1"]={"sigmoid":cpo("sigmoid"),"sigmoid ls=.1":cpo("sigmoid",label_smoothing=.1),"hinge":cpo("hinge"),"ipo":cpo("ipo"),"simpo g=.5":cpo("simpo"),"simpo alpha=.25":cpo("simpo",alpha=.25)}
# ---------------- Reward advantages (GRPO/RLOO groups) ----------------
from trl.trainer.utils import nanstd
R=torch.tensor([1.,0.,.5,0., 2.,2.,2.,2., -1.,3.,0.,1.])
gr=R.view(-1,4); mu=torch.nanmean(gr,1,keepdim=True); sd=nanstd(gr,dim=1,keepdim=True)
out["adv R=[1,0,.5,0|2,2,2,2|-1,3,0,1] G=4"]={"group":((gr-mu)/(sd+1e-4)).flatten().tolist(),"none":(gr-mu).flatten().tolist(),"batch":((gr-mu)/(nanstd(R)+1e-4)).flatten().tolist(),
  "rloo":(gr-(gr.sum(1,keepdim=True)-gr)/3).flatten().tolist()}
# ---------------- GKD jsd ----------------
from trl.experimental.gkd.gkd_trainer import GKDTrainer
sl,tl=grid_logits(2,3,"pol"),grid_logits(2,3,"ref")
out["gkd generalized_jsd_loss batchmean (B2,T3,V7 pol/ref, labels none)"]={f"beta={b} T={t}":GKDTrainer.generalized_jsd_loss(sl,tl,None,beta=b,temperature=t).item() for b,t in [(0.,1.),(0.5,1.),(1.,1.),(0.5,2.)]}
# ---------------- PPO helpers ----------------
from trl.experimental.ppo.ppo_trainer import masked_mean,masked_var,masked_whiten,truncate_response
x=torch.tensor([[1.,2.,3.,4.],[0.5,-1.,2.,8.]]); mk=torch.tensor([[True,True,True,False],[True,True,False,False]])
out["ppo masked_* x=[[1,2,3,4],[.5,-1,2,8]] mask=[[1,1,1,0],[1,1,0,0]]"]={"mean":masked_mean(x,mk).item(),"var":masked_var(x,mk).item(),"whiten":masked_whiten(x,mk).tolist(),"whiten_noshift":masked_whiten(x,mk,shift_mean=False).tolist()}
# ---------------- PPO: exec TRL's own source lines ----------------
import textwrap, inspect
import trl.experimental.ppo.ppo_trainer as P_
src=open(P_.__file__).read().split("\n")
def block(a,b): return textwrap.dedent("\n".join(src[a-1:b]))
Bp,Tp=3,5
sc=torch.tensor([1.0,-0.5,0.25]); seqlen=torch.tensor([2,4,1]) # index of last real token
base=torch.arange(Bp*Tp).view(Bp,Tp).double()
env=dict(P_.__dict__); env.update(torch=torch,args=NS(kl_estimator="k1",kl_coef=0.05,whiten_rewards=False,gamma=1.0,lam=0.95,cliprange=0.2,cliprange_value=0.2,vf_coef=0.1,temperature=1.0),empty_cache=lambda:None)
def ppo(kl_est="k1",whiten=False):
    e=dict(env); e["args"]=NS(**{**vars(env["args"]),"kl_estimator":kl_est,"whiten_rewards":whiten})
    e.update(responses=torch.zeros(Bp,Tp,dtype=torch.long),sequence_lengths=seqlen,scores=sc.clone(),
      logprobs=-1.5+0.5*torch.sin(base),ref_logprobs=-1.5+0.5*torch.cos(base),values=0.3*torch.sin(0.7*base+0.2))
    exec(block(763,798),e)   # padding masks .. advantages
    mb=dict(micro_batch_inds=torch.arange(Bp),mb_advantage=e["advantages"],mb_values=e["values"],mb_return=e["returns"],mb_logprobs=e["logprobs"])
    e.update(mb)
    e["new_logprobs"]=torch.masked_fill(e["logprobs"]+0.3*torch.cos(base),e["padding_mask"],P_.INVALID_LOGPROB)
    e["vpred"]=torch.masked_fill(e["values"]+0.4*torch.sin(base+1),e["padding_mask_p1"],0)
    exec(block(829,847),e)
    return dict(rewards=e["rewards"].tolist(),advantages=e["advantages"].tolist(),returns=e["returns"].tolist(),pg_loss=e["pg_loss"].item(),vf_loss=e["vf_loss"].item(),vf_clipfrac=e["vf_clipfrac"].item(),loss=e["loss"].item())
assert "response_idxs" in src[762] and "advantages = torch.masked_fill" in src[797] and "vpredclipped" in src[828] and "loss = pg_loss" in src[846]
out["ppo_k1"]=ppo(); out["ppo_k3"]={k:v for k,v in ppo("k3").items() if k in("pg_loss","vf_loss","loss")}; out["ppo_k1_whiten_rewards"]={k:v for k,v in ppo("k1",True).items() if k in("pg_loss","vf_loss","loss")}
# ---------------- SFT dft / nll ----------------
from trl.trainer.sft_trainer import dft_loss,_chunked_cross_entropy_loss
lg=grid_logits(2,5,"pol"); lab=ids(2,5).clone(); lab[0,:2]=-100; lab[1,:1]=-100; lab[1,4]=-100
out["sft (B2,T5) labels[0,:2]=labels[1,0]=labels[1,4]=-100"]={"dft":dft_loss(NS(logits=lg),lab.clone()).item(),
  "nll":torch.nn.functional.cross_entropy(lg[:,:-1].reshape(-1,V),lab[:,1:].reshape(-1),ignore_index=-100).item(),"n_valid":int((lab[:,1:]!=-100).sum())}
# ---------------- BT reward ----------------
rc=torch.tensor([1.2,-0.3,0.5]); rr=torch.tensor([0.7,0.1,-1.0]); mg=torch.tensor([0.5,0.,1.])
ls=lambda x:torch.nn.functional.logsigmoid(x)
out["reward rc=[1.2,-.3,.5] rr=[.7,.1,-1] margin=[.5,0,1]"]={"bt":-ls(rc-rr).mean().item(),"bt+margin":-ls(rc-rr-mg).mean().item(),"bt+center .01":(-ls(rc-rr).mean()+.01*((rc+rr)**2).mean()).item()}
json.dump(out,open(sys.argv[1],"w"),indent=1,default=float)
def show(o,ind=0):
    for k,v in o.items():
        if isinstance(v,dict): print(" "*ind+k+":"); show(v,ind+2)
        else: print(" "*ind+f"{k}: {v}")
show(out)
