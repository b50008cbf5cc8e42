//! From policies and what runs to what is begun: pure, so that a table can be tested.
//!
//! Looked at anew whenever anything may have changed, never from what was said before: a domain that runs, has a policy and is not
//! protected gets protected, unless somebody or something speaks against it. What speaks against it holds for this run of the guest
//! and this policy; a new run, another policy or `remus enable` begins anew.

use std::collections::BTreeMap;

use super::Policy;
use crate::ids::{DomId, Generation, ProtectionId};

/// What this host knows of the protection of one run of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// There was none.
    None,
    /// It is protected, being protected, or on its way to be: somebody is at it.
    Running,
    /// An operator has ended it.
    Stopped(Generation),
    /// It has ended by itself; the guest goes on here, unprotected.
    Lost,
    /// The guest is the other host's.
    Elsewhere,
}

/// A guest that runs here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Its UUID.
    pub uuid: ProtectionId,
    /// Its id: with the UUID it names one run.
    pub domid: DomId,
    /// Whether it is up: not paused (being built, restored or on an operator's word), not stopped.
    pub up: bool,
    /// See [`Protection`].
    pub protection: Protection,
}

/// How our own try to protect a guest has ended without success.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TryEnd {
    /// An operator has aborted it.
    Aborted,
    /// It cannot be as the guest or the policy is.
    Refused,
}

/// What to do now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Protect these.
    pub start: Vec<String>,
    /// Look again after a while: something is under way that nobody tells the end of.
    pub again: bool,
}

#[derive(Clone, Debug, Default)]
struct Memory {
    run: Option<(ProtectionId, DomId)>,
    policy: Option<Policy>,
    held: Option<TryEnd>,
    /// A try of ours was begun and its end not heard yet. That it has ended may be seen before.
    trying: bool,
    /// The protection that was ended by hand and does not count any more.
    excused: Option<Generation>,
    /// `remus enable` was said and has not been acted on.
    anew: bool,
}

/// Remembers what speaks against protecting a domain.
#[derive(Debug, Default)]
pub struct Planner {
    domains: BTreeMap<String, Memory>,
}

impl Planner {
    /// What to do about how it stands.
    pub fn look(&mut self, policies: &BTreeMap<String, Policy>, seen: &BTreeMap<String, Seen>) -> Plan {
        self.domains.retain(|name, _| policies.contains_key(name));
        let mut plan = Plan::default();
        for (name, policy) in policies {
            let memory = self.domains.entry(name.clone()).or_default();
            let Some(seen) = seen.get(name) else { continue };
            match memory.decide(policy, seen) {
                Verdict::Leave => {}
                Verdict::Again => plan.again = true,
                Verdict::Start => plan.start.push(name.clone()),
            }
        }
        plan
    }

    /// A try of ours has ended: with success (or it was not begun), or for good.
    pub fn ended(&mut self, name: &str, how: Option<TryEnd>) {
        if let Some(memory) = self.domains.get_mut(name) {
            (memory.trying, memory.held) = (false, how);
        }
    }

    /// An operator wants the domain's policy to count, whatever was before.
    pub fn anew(&mut self, name: &str) {
        self.domains.entry(name.to_owned()).or_default().anew = true;
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Leave,
    Again,
    Start,
}

impl Memory {
    fn decide(&mut self, policy: &Policy, seen: &Seen) -> Verdict {
        let run = (seen.uuid, seen.domid);
        let another = self.run.is_some_and(|known| known != run) || self.policy.as_ref().is_some_and(|p| p != policy);
        if another || self.anew {
            self.held = None;
        }
        (self.run, self.policy) = (Some(run), Some(policy.clone()));
        if std::mem::take(&mut self.anew)
            && let Protection::Stopped(generation) = seen.protection
        {
            self.excused = Some(generation);
        }
        match seen.protection {
            _ if self.trying => Verdict::Leave,
            Protection::Running | Protection::Elsewhere => Verdict::Leave,
            Protection::Stopped(generation) if self.excused != Some(generation) => Verdict::Leave,
            _ if self.held.is_some() => Verdict::Leave,
            _ if !seen.up => Verdict::Again,
            Protection::None | Protection::Lost | Protection::Stopped(_) => {
                self.trying = true;
                Verdict::Start
            }
        }
    }
}
