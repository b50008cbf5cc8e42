//! How the protections of this host stand.

use std::time::{Duration, Instant};

use super::{Daemon, Primary};
use crate::api::{ApiError, ErrorCode, MayRun, Role, StatusRow};
use crate::backup::IncomingStatus;
use crate::link;
use crate::ops::DomainRef;
use crate::protect::machine::{Outcome, State};

impl Daemon {
    /// A row for each protection, or for those of one domain.
    ///
    /// # Errors
    /// `NotFound` when this host knows nothing of the domain that is asked for.
    pub async fn rows(&self, domain: Option<&str>) -> Result<Vec<StatusRow>, ApiError> {
        let mut rows: Vec<_> = self.primaries.lock().await.values().map(primary_row).collect();
        rows.extend(self.backups.list().iter().map(backup_row));
        rows.sort_by(|a, b| (&a.domain, a.role as u8).cmp(&(&b.domain, b.role as u8)));
        let Some(typed) = domain else { return Ok(rows) };
        rows.retain(|row| DomainRef { domid: row.domid, name: row.domain.clone(), uuid: row.uuid }.is_meant_by(typed));
        if rows.is_empty() {
            return Err(ApiError::new(
                ErrorCode::NotFound,
                format!("{typed} is neither protected by nor backed up on this host"),
            ));
        }
        Ok(rows)
    }
}

fn ms(duration: Duration) -> u64 {
    duration.as_millis() as u64
}

fn primary_row(primary: &Primary) -> StatusRow {
    let snapshot = primary.handle.snapshot.borrow().clone();
    let outcome = primary.handle.outcome.borrow().clone();
    let (state, detail) = match (&outcome, &snapshot.state) {
        (Some(Outcome::Alone(why)), _) => ("unprotected", format!("UNPROTECTED: {why}")),
        (Some(Outcome::Stopped), _) => ("stopped", "protection was ended".into()),
        (Some(Outcome::NotStarted(why)), _) => ("not-started", why.clone()),
        (Some(Outcome::GuestEnded(end)), _) => ("guest-ended", format!("the guest ended: {end}")),
        (Some(Outcome::Superseded(why)), _) => ("superseded", why.clone()),
        (Some(Outcome::HandedOver(why)), _) => ("handed-over", why.clone()),
        (None, State::Starting) => ("starting", String::new()),
        (None, State::FirstCopy) => ("first-copy", "not protected yet".into()),
        (None, State::Recording(_) | State::Stopping(_)) => ("stopping", String::new()),
        (None, State::ShippingLast(_) | State::CommittingLast(_) | State::HandingOver(_) | State::HandedOver(_)) => {
            ("switching-over", "the guest stands still until it runs on the other host".into())
        }
        (None, State::Yielding(_)) => {
            ("yielding", "frozen and sealed: the witness says that the other host takes over".into())
        }
        (None, State::Unrecorded(_)) => {
            ("unrecorded", "UNPROTECTED; runs on an operator's word, the witness has still to be told".into())
        }
        (None, State::Arbitrating(_)) => ("arbitrating", String::new()),
        (None, State::Holding(_)) => {
            ("holding", "UNPROTECTED and output is held; `remus unprotect` lets it flow".into())
        }
        (None, State::Retrying(_)) => ("guest-stuck", "the guest does not suspend; its output waits".into()),
        (None, State::CleaningUp(_) | State::Ended(_)) => ("ending", String::new()),
        (None, _) if snapshot.protected && primary.witness && snapshot.token == link::Token::Primary => (
            "protected",
            "DEGRADED: the witness does not decide; if this host fails only an operator can activate the copy".into(),
        ),
        (None, _) if snapshot.protected => ("protected", String::new()),
        (None, _) => ("syncing", "not protected yet".into()),
    };
    let detail = match primary.unsafe_target {
        true if outcome.is_none() => format!("UNSAFE: {} acknowledges nothing. {detail}", primary.target.label()),
        _ => detail,
    };
    let may_run = match (&outcome, &snapshot.state) {
        (Some(Outcome::Superseded(_) | Outcome::HandedOver(_)), _) | (None, State::Yielding(_)) => MayRun::Peer,
        (Some(Outcome::GuestEnded(_)), _) => MayRun::Nobody,
        (None, State::Arbitrating(_) | State::Holding(_) | State::HandingOver(_) | State::HandedOver(_)) => {
            MayRun::Undecided
        }
        _ => MayRun::Here,
    };
    let protected = snapshot.protected && outcome.is_none() && !primary.unsafe_target;
    let age = |at: Instant| ms(at.elapsed());
    // The copy has the state of its epoch's suspend, which was earlier than its acknowledgement.
    let before_ack = snapshot.report.as_ref().map_or(0, |r| (r.capture_us + r.resume_us + r.send_us + r.ack_us) / 1000);
    StatusRow {
        domain: primary.domain.name.clone(),
        uuid: primary.domain.uuid,
        domid: primary.domain.domid,
        role: Role::Primary,
        peer: primary.target.label(),
        state: state.into(),
        protected,
        may_run,
        generation: primary.generation,
        acked: snapshot.acked.map(|(epoch, _)| epoch),
        acked_age_ms: snapshot.acked.map(|(_, at)| age(at)),
        stale_ms: snapshot.acked.filter(|_| protected).map(|(_, at)| age(at) + before_ack),
        held_packets: snapshot.held.0,
        held_bytes: snapshot.held.1,
        dropped_packets: snapshot.held.2,
        last_epoch: snapshot.report,
        interval: Some(snapshot.interval),
        detail: detail.trim_end().into(),
    }
}

fn backup_row(status: &IncomingStatus) -> StatusRow {
    let state = serde_json::to_value(status.role()).ok().and_then(|v| v.as_str().map(str::to_lowercase));
    let acked_age_ms = status.acked_at.map(|at| ms(at.elapsed()));
    let protected = status.role() == link::Role::Armed;
    StatusRow {
        domain: status.offer.domain.clone(),
        uuid: status.offer.protection,
        domid: status.domid,
        role: Role::Backup,
        peer: status.peer.clone(),
        state: state.unwrap_or_default(),
        protected,
        may_run: match status.role() {
            link::Role::Active => MayRun::Here,
            link::Role::Activating => MayRun::Undecided,
            _ => MayRun::Peer,
        },
        generation: status.key.generation,
        acked: status.acked,
        acked_age_ms,
        stale_ms: acked_age_ms.filter(|_| protected),
        held_packets: 0,
        held_bytes: 0,
        dropped_packets: 0,
        last_epoch: None,
        interval: None,
        detail: status.detail.clone(),
    }
}
