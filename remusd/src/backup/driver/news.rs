//! What a protection tells the world: events, records, answers to operators.

use tokio::time::Instant;

use super::{Activation, Driver};
use crate::backup::error::CommandError;
use crate::backup::incoming::{ActivationReport, domain_ref};
use crate::backup::machine::{Authority, Event, Report};
use crate::backup::record::Phase;
use crate::ids::Epoch;
use crate::ops::EventKind;
use crate::witness::Health;

/// From here on a jump of the guest's wall clock at a failover is worth a word, in milliseconds.
const SKEW: u64 = 100;

/// What a heartbeat's clock, milliseconds since the Unix epoch, tells next to ours (hazard F25d).
pub(super) fn clock_skew(theirs: u64, ours: u64) -> Option<String> {
    let skew = theirs.abs_diff(ours);
    let ahead = if theirs > ours { "ahead of" } else { "behind" };
    (skew > SKEW).then(|| {
        format!(
            "the primary's clock is {skew} ms {ahead} this host's: after a failover the guest's wall clock would jump; run NTP on both \
             hosts"
        )
    })
}

impl Driver {
    pub(super) fn publish(&self, kind: EventKind, detail: String) {
        let domid = self.status.borrow().domid;
        self.status.send_modify(|status| status.detail.clone_from(&detail));
        self.events.publish(domain_ref(self.whose.uuid, &self.whose.name, domid), kind, detail);
    }

    pub(super) fn report(&mut self, report: Report) {
        match report {
            Report::Armed(epoch) => {
                self.publish(
                    EventKind::Ready,
                    format!("the copy is complete as of epoch {epoch} and can be activated"),
                );
            }
            Report::Suspect(text) | Report::Waiting(text) | Report::Abstaining(text) => self.publish(EventKind::PrimarySuspect, text),
            Report::Activating(epoch, authority) => {
                self.activation =
                    Some(Activation { epoch, authority, began: Instant::now(), built: None, claimed: None });
                let word = match authority {
                    Authority::Operator => "an operator says that the primary is off",
                    Authority::Policy => "the primary is lost and on_primary_loss=activate",
                    Authority::Witness => "the primary is lost; the witness decides",
                    Authority::Handover => "the primary hands the guest over",
                };
                self.publish(EventKind::Activating, format!("activating the copy of epoch {epoch}: {word}"));
            }
            Report::Active(epoch) => {
                self.record.activated = Some(epoch);
                self.save(Phase::Active);
                let report = self.activation_report(epoch);
                self.status.send_modify(|status| status.activation = report);
                let took = report.map_or(0, |report| report.running_ms);
                self.publish(EventKind::Activated, format!("the copy of epoch {epoch} runs here, after {took} ms"));
                if let (Some(reply), Some(report)) = (self.failover.take(), report) {
                    let _ = reply.send(Ok(report));
                }
            }
            Report::ActivationFailed(text) => {
                if let Some(reply) = self.failover.take() {
                    let _ = reply.send(Err(CommandError::Failed(text.clone())));
                }
                self.publish(EventKind::ActivationFailed, text);
            }
            Report::WitnessSilent => self.publish(
                EventKind::Holding,
                "the copy is built but the witness does not say whether it may run; it is asked on. If the guest surely runs nowhere \
                 else: `remus assume-alone`"
                    .into(),
            ),
            Report::Token(token) => self.status.send_modify(|status| status.token = token),
            Report::TokenUnsaved(text) => {
                self.publish(EventKind::Degraded, format!("who decides cannot be written down here, so nothing changes: {text}"));
            }
            Report::Discarded(text) => {
                self.record.owed = false;
                self.forget_gate();
                self.save(Phase::Discarded);
                self.status.send_modify(|status| status.domid = None);
                self.publish(EventKind::Discarded, text);
                if let Some(reply) = self.discard.take() {
                    let _ = reply.send(Ok(()));
                }
            }
        }
    }

    /// The witness has answered who owns the guest.
    pub(super) fn arbitration(&self, event: &Event) {
        match event {
            Event::ClaimWon(key) => self.publish(
                EventKind::ArbitrationWon,
                format!("the witness's record (generation {}) is this host's: the copy may run", key.generation),
            ),
            Event::ClaimLost(text) => self.publish(
                EventKind::ArbitrationLost,
                format!("the witness has given the guest to the other host: {text}"),
            ),
            _ => {}
        }
    }

    /// Whether this host could ask the witness at all. The protection goes on: it is the next fault that would meet it.
    pub(super) fn witness_health(&mut self, health: &Health) {
        match health {
            Health::Down(why) if !self.witness_away => {
                self.witness_away = true;
                let text = "this host does not reach the witness; while that is so it cannot win the guest if the primary fails";
                self.publish(EventKind::Degraded, format!("{text}: {why}"));
            }
            Health::Up if self.witness_away => {
                self.witness_away = false;
                self.publish(EventKind::WhoDecides, "this host reaches the witness again".into());
            }
            _ => {}
        }
    }

    fn activation_report(&self, epoch: Epoch) -> Option<ActivationReport> {
        let activation = self.activation.as_ref()?;
        debug_assert_eq!(activation.epoch, epoch);
        let until = |at: Option<Instant>| {
            let at = at.unwrap_or_else(Instant::now);
            u64::try_from(at.duration_since(activation.began).as_millis()).unwrap_or(u64::MAX)
        };
        Some(ActivationReport {
            epoch,
            authority: activation.authority,
            built_ms: until(activation.built),
            claimed_ms: until(activation.claimed),
            running_ms: until(None),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_that_differ_by_more_than_a_tenth_of_a_second_are_told_with_their_sign() {
        assert_eq!((clock_skew(1000, 1100), clock_skew(1100, 1000)), (None, None));
        assert!(clock_skew(1000, 1101).unwrap().contains("101 ms behind"));
        assert!(clock_skew(1201, 1000).unwrap().contains("201 ms ahead of"));
    }
}
