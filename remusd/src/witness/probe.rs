//! Asks the witness all the time, so that its loss is known before it is needed (hazard F19).

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::config::ProbeConfig;
use super::record::Position;
use super::store::WitnessStore;

/// Whether the witness can be asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// Not known yet.
    Untried,
    /// It answers.
    Up,
    /// It does not; the reason.
    Down(String),
}

/// Counts answers: down after so many failures, up after so many successes one after another; the first success of all is enough.
#[derive(Clone, Debug)]
pub struct Hysteresis {
    config: ProbeConfig,
    health: Health,
    failures: u32,
    successes: u32,
}

impl Hysteresis {
    /// Nothing is known yet.
    #[must_use]
    pub fn new(config: ProbeConfig) -> Self {
        Self { config, health: Health::Untried, failures: 0, successes: 0 }
    }

    /// Takes a probe's result; the new health if it has changed.
    pub fn probed(&mut self, result: Result<(), String>) -> Option<&Health> {
        match result {
            Ok(()) => {
                self.failures = 0;
                self.successes = self.successes.saturating_add(1);
                let enough = match self.health {
                    Health::Up => return None,
                    Health::Untried => true,
                    Health::Down(_) => self.successes >= self.config.up_after,
                };
                if !enough {
                    return None;
                }
                self.health = Health::Up;
            }
            Err(why) => {
                self.successes = 0;
                self.failures = self.failures.saturating_add(1);
                if matches!(self.health, Health::Down(_)) || self.failures < self.config.down_after {
                    return None;
                }
                self.health = Health::Down(why);
            }
        }
        Some(&self.health)
    }
}

/// A running probe of one store, for all protections that use it. Dropping it ends it.
#[derive(Debug)]
pub struct Probe {
    health: watch::Receiver<Health>,
    position: watch::Receiver<Option<Position>>,
    task: AbortHandle,
}

impl Probe {
    /// Starts probing.
    #[must_use]
    pub fn start(store: Arc<dyn WitnessStore>, config: ProbeConfig) -> Self {
        let (health_out, health) = watch::channel(Health::Untried);
        let (position_out, position) = watch::channel(None);
        let task = tokio::spawn(async move {
            let mut count = Hysteresis::new(config);
            loop {
                let result = store.probe().await;
                if let Ok(position) = &result {
                    position_out.send_modify(|seen| remember(seen, position));
                }
                if let Some(health) = count.probed(result.map(|_| ())) {
                    match health {
                        Health::Down(why) => tracing::warn!("The witness, {}, is down: {why}", store.describe()),
                        _ => tracing::info!("The witness, {}, is up", store.describe()),
                    }
                    health_out.send_replace(health.clone());
                }
                tokio::time::sleep(Duration::from_millis(config.interval_ms)).await;
            }
        });
        Self { health, position, task: task.abort_handle() }
    }

    /// Whether the witness is up, and a notice of every change.
    #[must_use]
    pub fn health(&self) -> watch::Receiver<Health> {
        self.health.clone()
    }

    /// The newest place that the store was at, as far as the probe has seen.
    #[must_use]
    pub fn position(&self) -> watch::Receiver<Option<Position>> {
        self.position.clone()
    }
}

/// The newest position of a store is kept: an older one is that of a rolled-back store, and forgetting the newer one would hide that (R4,
/// hazard F7).
pub fn remember(seen: &mut Option<Position>, now: &Position) {
    match seen {
        Some(seen) if seen.store == now.store => seen.revision = seen.revision.max(now.revision),
        _ => *seen = Some(now.clone()),
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::MemoryStore;
    use super::*;

    #[test]
    fn one_failure_or_success_changes_nothing() {
        let mut h = Hysteresis::new(ProbeConfig { interval_ms: 1, down_after: 3, up_after: 2 });
        let mut seen = String::new();
        for c in "+++--+---+-++".chars() {
            match h.probed(if c == '+' { Ok(()) } else { Err("no".into()) }) {
                Some(Health::Up) => seen.push('U'),
                Some(Health::Down(why)) => seen.push_str(if why == "no" { "D" } else { "?" }),
                _ => seen.push('.'),
            }
        }
        assert_eq!(seen, "U.......D...U");
        let mut h = Hysteresis::new(ProbeConfig { interval_ms: 1, down_after: 2, up_after: 2 });
        assert_eq!(h.probed(Err("a".into())), None);
        assert_eq!(h.probed(Err("b".into())), Some(&Health::Down("b".into())), "down from the start is said too");
    }

    #[test]
    fn a_rollback_does_not_make_it_forget() {
        let at = |store: &str, revision| Position { store: store.into(), revision, modified: 0 };
        let mut seen = None;
        for position in [at("a", 3), at("a", 7), at("a", 4)] {
            remember(&mut seen, &position);
        }
        assert_eq!(seen, Some(at("a", 7)));
        remember(&mut seen, &at("b", 1));
        assert_eq!(seen, Some(at("b", 1)));
    }

    #[tokio::test(start_paused = true)]
    async fn tells_every_change() {
        let store = MemoryStore::new("m");
        let probe = Probe::start(Arc::new(store.clone()), ProbeConfig::default());
        let mut health = probe.health();
        health.wait_for(|h| *h == Health::Up).await.unwrap();
        assert_eq!(probe.position().borrow().clone(), Some(store.with(|t| t.position(0))));
        store.faults(|f| f.down = true);
        health.wait_for(|h| matches!(h, Health::Down(_))).await.unwrap();
        store.faults(|f| f.down = false);
        health.wait_for(|h| *h == Health::Up).await.unwrap();
        drop(probe);
        assert!(health.changed().await.is_err(), "it ends");
    }
}
