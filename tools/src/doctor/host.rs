//! A host to examine, and the results of checks.

use super::powers::Powers;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The result of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// It is met.
    Ok,
    /// Transfers work without it, but slower.
    Advice,
    /// It is not met.
    Missing,
}

/// A precondition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// The precondition.
    pub name: &'static str,
    /// The result.
    pub status: Status,
    /// What the check found.
    pub found: String,
    /// How to fix it; empty if there is nothing to do.
    pub todo: String,
}

pub(super) fn check(name: &'static str, status: Status, found: impl Into<String>, todo: impl Into<String>) -> Check {
    Check { name, status, found: found.into(), todo: todo.into() }
}

pub(super) fn ok(name: &'static str, found: impl Into<String>) -> Check {
    check(name, Status::Ok, found, "")
}

pub(super) fn missing(name: &'static str, found: impl Into<String>, todo: impl Into<String>) -> Check {
    check(name, Status::Missing, found, todo)
}

pub(super) fn advice(name: &'static str, found: impl Into<String>, todo: impl Into<String>) -> Check {
    check(name, Status::Advice, found, todo)
}

/// A host to examine: its file system and the variables of the process.
pub struct Host {
    /// Root of the file system; not / only in tests.
    pub root: PathBuf,
    /// The environment.
    pub variables: BTreeMap<String, String>,
    /// Name and file of the plugin that an engine uses here, or why it uses none.
    pub plugin: Result<(String, Option<String>), String>,
    /// PCI addresses of the GPUs, such as 0000:4a:00.0.
    pub gpus: Vec<String>,
    /// What the system lets this process do beside others on the host.
    pub(super) powers: Powers,
}

impl Host {
    /// This one, with the plugin in use (its name and file, or why there is none) and the PCI addresses of the GPUs.
    pub fn here(plugin: Result<(String, Option<String>), String>, gpus: Vec<String>) -> Host {
        let variables = std::env::vars_os().filter_map(|(n, v)| Some((n.into_string().ok()?, v.into_string().ok()?))).collect();
        Host { root: "/".into(), variables, plugin, gpus, powers: Powers::of_this_process() }
    }

    pub(super) fn var(&self, name: &str) -> Option<&str> {
        self.variables.get(name).map(|v| v.trim()).filter(|v| !v.is_empty())
    }

    pub(super) fn path(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    pub(super) fn read(&self, path: &str) -> Option<String> {
        fs::read_to_string(self.path(path)).ok().map(|text| text.trim().to_owned())
    }

    pub(super) fn names(&self, path: &str) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.path(path)) else { return Vec::new() };
        let mut names: Vec<String> = entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    /// A number as the plugin parses it: decimal, hexadecimal with 0x, octal with 0; anything that does not parse in full is an
    /// error.
    pub(super) fn number(&self, name: &str) -> Option<Result<i64, &str>> {
        let text = self.var(name)?;
        let parsed = match (text.strip_prefix("0x"), text.strip_prefix('0')) {
            (Some(hex), _) => i64::from_str_radix(hex, 16),
            (None, Some(octal)) if !octal.is_empty() => i64::from_str_radix(octal, 8),
            _ => text.parse(),
        };
        Some(parsed.map_err(|_| text))
    }

    /// NICs chosen by a list of names or prefixes ('=' exact, '^' all but).
    pub(super) fn nics(&self, list: &str) -> Vec<String> {
        let (exact, but) = (list.starts_with('='), list.starts_with('^'));
        let words: Vec<&str> = list.trim_start_matches(['=', '^']).split(',').map(str::trim).filter(|w| !w.is_empty()).collect();
        let chosen = |nic: &String| words.iter().any(|w| if exact { nic == w } else { nic.starts_with(w) });
        self.names("/sys/class/net").into_iter().filter(|nic| chosen(nic) != but && nic != "lo").collect()
    }

    pub(super) fn data_nics(&self) -> Vec<String> {
        self.var("NCCL_GPUDIRECTTCPX_SOCKET_IFNAME").map_or_else(Vec::new, |list| self.nics(list))
    }

    /// The PCI path of a device: its bridges, from the root complex down.
    pub(super) fn pci_path(&self, device: &Path) -> Vec<String> {
        let Ok(path) = fs::canonicalize(device) else { return Vec::new() };
        path.components().map(|c| c.as_os_str().to_string_lossy().into_owned()).filter(|c| c.contains(':')).collect()
    }
}
