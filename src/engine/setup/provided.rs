//! What a set-up provides: what carries the memory of each pair of places, with the reasons why nothing better does, and whether the
//! engine's requirement admits it. Knows nothing about how channels come up.

use super::channels::plan::{own_gpu, Plan};
use super::channels::{Raised, Up};
use super::context::SetupContext;
use super::control::Agreed;
use super::local::Local;
use crate::require::{carrier, Carries, DIRECT, NVLINK};
use crate::status::{bail, Result};
use crate::types::Place;
use crate::wire::hello::Hello;
use std::collections::BTreeSet;

/// Checks what is up against UCCL_TCPX_REQUIRE.
///
/// # Errors
/// `Unsupported` names what is required, what is there, and why.
pub(super) fn check(context: &SetupContext, agreed: &Agreed, up: &Up) -> Result<()> {
    let required = &context.config.require;
    if required.is_empty() {
        return Ok(());
    }
    let mut provided = all(&up.sets, &up.local, &agreed.own, &agreed.peer.hello);
    for carries in &mut provided {
        carries.no_plugin.extend(context.plugins.why_soft.clone());
    }
    match required.check(&provided) {
        Ok(()) => Ok(()),
        Err(unmet) => bail!(Unsupported, "UCCL_TCPX_REQUIRE={required}: {unmet}"),
    }
}

/// What carries the memory of each pair of GPUs; host memory where the engines have no GPU.
fn all(sets: &[Raised], local: &Local, own: &Hello, peer: &Hello) -> Vec<Carries> {
    let gpus = |hello: &Hello| -> Vec<Place> {
        std::iter::once(own_gpu(hello)).chain(hello.further_gpus.iter().copied()).map(Place::gpu).collect()
    };
    let (here, there) = (gpus(own), gpus(peer));
    let pairs = here.into_iter().flat_map(|here| there.iter().map(move |&there| (here, there)));
    let have_gpus = own.gpu_index >= 0 && peer.gpu_index >= 0;
    let of_set = |pair: (Place, Place)| sets.iter().any(|set| set.plan.gpus == Some(pair));
    let of_gpus: Vec<Carries> = pairs
        .filter(|&pair| have_gpus || of_set(pair) || local.joins(pair).is_some())
        .map(|pair| between(sets, local, pair))
        .collect();
    match of_gpus.is_empty() {
        true => vec![between(sets, local, (Place::HOST, Place::HOST))],
        false => of_gpus,
    }
}

/// What carries memory between two places.
fn between(sets: &[Raised], local: &Local, pair: (Place, Place)) -> Carries {
    let memory = match pair.0.is_device() {
        true => format!("memory of {}", Plan::purpose_of(Some(pair))),
        false => Plan::purpose_of(None),
    };
    // Of several sets that carry a pair the first is taken.
    let candidate = |set: &&Raised| match set.plan.gpus {
        Some(gpus) => gpus == pair,
        None => pair.0.is_device() || set.plan.plugin.traits.host_memory,
    };
    let (mut found, mut no_plugin) = (None, Vec::new());
    for set in sets.iter().filter(candidate) {
        if !set.pairs.is_empty() {
            found = Some(set);
            break;
        }
        no_plugin.push(format!("not over {}: {}", set.plan.plugin.name, set.why_not()));
    }
    let distinct = |nics: &mut dyn Iterator<Item = &String>| nics.cloned().collect::<BTreeSet<String>>();
    let (nics, all) = found.map_or_else(Default::default, |set| {
        let up = distinct(&mut set.pairs.iter().map(|pair| &pair.nic));
        (up, distinct(&mut set.names.iter().map(|(nic, _)| nic)))
    });
    let carrier = match (local.joins(pair), found) {
        (Some(true), _) => NVLINK,
        (Some(false), _) => DIRECT,
        (None, Some(set)) => carrier(&set.plan.plugin.name),
        (None, None) => "no path",
    };
    Carries {
        memory,
        carrier: carrier.to_owned(),
        no_plugin,
        no_direct: local.joins(pair).is_none().then(|| local.reason().to_owned()),
        absent: all.difference(&nics).cloned().collect(),
        nics: nics.into_iter().collect(),
    }
}
