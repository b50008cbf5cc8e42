//! What a restarted daemon does about a protection it finds on disk, in the one safe order: seal, resume the guest sealed, find out who
//! owns it, and only then unseal or destroy (R9, hazards F2, F6, F23). Sans-IO.
//!
//! Each action has exactly one event for its end, and there is always one action at a time: a daemon that dies between any two of
//! them starts anew with the first.

use super::machine::OnBackupLoss;
use super::options::OnPrimaryLoss;
use crate::enforced::enforced;
use crate::link::{RecordKey, Role, Token};

/// What is known before anything is done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// Whether an epoch may have been armed: only then can another copy run.
    pub armed: bool,
    /// Whether it was already known here that the other copy runs.
    pub superseded: bool,
    /// Whether the domain is there.
    pub present: bool,
    /// An operator asserts that no other copy runs.
    pub assume_owner: bool,
    /// The peer's name, if there is a `remusd` that can be asked.
    pub peer: Option<String>,
    /// Who decides: the durable mode (hazard F19).
    pub token: Token,
    /// Whether the guest was given to the backup without a witness: then only its word gives it back.
    pub handed_over: bool,
    /// What was to be done on the loss of the backup.
    pub on_backup_loss: OnBackupLoss,
    /// What the backup was told to do on the loss of this host.
    pub on_primary_loss: OnPrimaryLoss,
}

/// What has happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Every interface is sealed.
    Sealed,
    /// The guest runs, or is not there to run.
    Resumed,
    /// The peer's answer.
    Peer(Role),
    /// The peer does not answer.
    Silent(String),
    /// The peer has given its copy up.
    PeerDiscarded,
    /// It has not; why.
    NotDiscarded(String),
    /// Waited for a while.
    Waited,
    /// The time for asking is used up.
    PatienceOver,
    /// The record is ours.
    ClaimWon(RecordKey),
    /// The peer has won it.
    ClaimLost(String),
    /// The record is absent, rolled back or not ours.
    ClaimRefused(String),
    /// The witness does not tell; asking goes on.
    ClaimUnknown(String),
    /// That the guest runs here is being recorded.
    Recording,
    /// The guest's vCPUs are stopped.
    Frozen,
    /// The record says that the peer's copy runs.
    RecordActive(String),
    /// The record may be claimed again.
    RecordForfeited,
}

/// The one thing to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Seal every interface that is there. If that fails nothing more may be done.
    Seal,
    /// End a left-over engine; make the guest run, sealed, without a pending suspend request.
    ResumeSealed,
    /// Ask the peer what it is to this protection.
    AskPeer,
    /// Have the peer destroy its copy.
    DiscardAtPeer,
    /// Wait a little before asking again.
    Wait,
    /// Claim exactly this record.
    Claim(RecordKey),
    /// Say that the guest stays sealed for now, since the witness does not tell who owns it, and wait for how the claim ends.
    AwaitClaim(RecordKey, String),
    /// Record that the guest runs here, for as long as that takes; do not wait for it.
    Activate(RecordKey),
    /// Stop the guest's vCPUs and say why: the peer has won, and its copy may yet fail to start (hazard F6).
    Freeze(String),
    /// Watch the record until the peer's copy runs or it may be claimed.
    WatchRecord(RecordKey),
    /// This host owns the guest: unseal, put everything back, forget the record. The last action.
    TakeOver(String),
    /// The peer owns it: freeze and destroy the copy here, sealed throughout. The last action.
    GiveUp(String),
    /// There is no domain here any more (this host was off): forget the record and leave the peer's copy, which may be the only one
    /// left, to whoever decides about it there. The last action.
    StandAside(String),
    /// Nobody knows: the guest runs sealed until an operator or a later try decides. The last action.
    StaySealed(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Last {
    Nothing,
    Silent(String),
    Activating,
    Holds(String),
}

/// The recovery of one protection. See the module.
#[derive(Clone, Debug)]
pub struct Recovery {
    known: Known,
    last: Last,
}

impl Recovery {
    /// The recovery and its first action.
    #[must_use]
    pub fn begin(known: Known) -> (Self, Action) {
        // Before the first armed epoch no other copy can run, and sealing would only hurt.
        let first = if known.armed { Action::Seal } else { Action::ResumeSealed };
        (Self { known, last: Last::Nothing }, first)
    }

    /// Takes the end of the action under way; returns the next one.
    pub fn step(&mut self, event: Event) -> Action {
        match event {
            Event::Sealed => Action::ResumeSealed,
            Event::Resumed => self.who(),
            Event::Peer(role) => self.peer(role),
            Event::Silent(text) => {
                self.last = Last::Silent(text);
                Action::Wait
            }
            Event::PeerDiscarded => Action::TakeOver(format!("{} has given up its copy", self.name())),
            Event::NotDiscarded(text) => {
                self.last = Last::Holds(text);
                Action::Wait
            }
            Event::ClaimWon(key) => {
                // A newer one after a force of an earlier life.
                self.known.token = Token::Witness(key);
                Action::Activate(key)
            }
            Event::Recording => Action::TakeOver("the witness says that the guest is this host's".into()),
            Event::ClaimLost(text) => Action::Freeze(text),
            Event::ClaimRefused(text) => Action::StaySealed(text),
            Event::ClaimUnknown(text) => self.with_record(|key| Action::AwaitClaim(key, text)),
            Event::Frozen => self.with_record(Action::WatchRecord),
            Event::RecordActive(text) => Action::GiveUp(format!("{} runs the guest ({text})", self.name())),
            Event::RecordForfeited => self.with_record(Action::Claim),
            Event::Waited => Action::AskPeer,
            Event::PatienceOver => self.out_of_patience(),
        }
    }

    /// For what happens only with a record.
    fn with_record(&self, action: impl FnOnce(RecordKey) -> Action) -> Action {
        match self.known.token.record() {
            Some(key) => action(key),
            None => Action::StaySealed("the witness answered although it does not decide".into()),
        }
    }

    fn name(&self) -> &str {
        self.known.peer.as_deref().unwrap_or("the peer")
    }

    fn who(&self) -> Action {
        let known = &self.known;
        if known.assume_owner {
            return Action::TakeOver("an operator says that no other copy runs".into());
        }
        if known.superseded {
            return Action::GiveUp("the peer had said that its copy runs".into());
        }
        if !known.armed {
            return Action::TakeOver("no epoch was armed, so no other copy can run".into());
        }
        if !enforced("R9-owner-before-unsealing") {
            return Action::TakeOver("nobody was asked".into());
        }
        if !known.present && enforced("R9-nothing-here-owns-nothing") {
            let text =
                format!("no domain is left here; what {} holds may be the only copy and is not touched", self.name());
            return Action::StandAside(text);
        }
        // The peer's word is no proof: it may have lost the record to nobody but us (R3).
        if let Token::Witness(key) = known.token {
            return Action::Claim(key);
        }
        if known.peer.is_none() {
            return Action::TakeOver("there is no remusd at the other side".into());
        }
        Action::AskPeer
    }

    fn peer(&mut self, role: Role) -> Action {
        let peer = self.name().to_owned();
        match role {
            Role::Active => Action::GiveUp(format!("{peer} has activated its copy")),
            Role::None | Role::Discarded => Action::TakeOver(format!("{peer} holds no copy")),
            // It may yet fail, and then this copy is the only one (hazard F6): neither unsealed nor destroyed.
            Role::Activating => {
                self.last = Last::Activating;
                Action::Wait
            }
            // It is stale as soon as this one runs on: it has to be given up first (R4).
            Role::Syncing | Role::Armed => Action::DiscardAtPeer,
        }
    }

    fn out_of_patience(&self) -> Action {
        let peer = self.name();
        let silence = match &self.last {
            Last::Activating => return Action::StaySealed(format!("{peer} is activating its copy")),
            Last::Holds(error) => {
                return Action::StaySealed(format!("{peer} holds a copy and does not give it up: {error}"));
            }
            Last::Silent(text) => text.as_str(),
            Last::Nothing => "it was not asked",
        };
        if self.known.handed_over {
            return Action::StaySealed(format!(
                "the guest was handed over to {peer}, which does not answer ({silence})"
            ));
        }
        if self.known.on_backup_loss == OnBackupLoss::Hold {
            return Action::StaySealed(format!("{peer} does not answer ({silence}) and output was to be held then"));
        }
        match self.known.on_primary_loss {
            // The token is the primary's: the peer activates only if an operator has asserted that this host is off (hazard F19).
            OnPrimaryLoss::Wait => {
                Action::TakeOver(format!("{peer} does not answer ({silence}), and activates nothing by itself"))
            }
            OnPrimaryLoss::Activate => {
                Action::StaySealed(format!("{peer} does not answer ({silence}) and may have activated its copy"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known() -> Known {
        Known {
            armed: true,
            superseded: false,
            present: true,
            assume_owner: false,
            peer: Some("b".into()),
            token: Token::Primary,
            handed_over: false,
            on_backup_loss: OnBackupLoss::Alone,
            on_primary_loss: OnPrimaryLoss::Wait,
        }
    }

    fn key() -> RecordKey {
        RecordKey { generation: crate::ids::Generation(5), nonce: crate::ids::Nonce(uuid::Uuid::from_u128(9)) }
    }

    fn decided() -> Known {
        Known { token: Token::Witness(key()), ..known() }
    }

    fn through(known: Known, events: &[Event]) -> Vec<Action> {
        let (mut recovery, first) = Recovery::begin(known);
        std::iter::once(first).chain(events.iter().map(|event| recovery.step(event.clone()))).collect()
    }

    fn last(known: Known, answers: &[Event]) -> Action {
        let events = [&[Event::Sealed, Event::Resumed], answers].concat();
        let actions = through(known, &events);
        assert_eq!(actions[..2], [Action::Seal, Action::ResumeSealed], "sealed before the guest runs (F2)");
        let decided = actions.iter().position(|a| matches!(a, Action::TakeOver(_) | Action::GiveUp(_)));
        assert!(decided.is_none_or(|at| at == actions.len() - 1), "{actions:?}");
        actions.last().cloned().unwrap_or(Action::Wait)
    }

    #[test]
    fn a_copy_that_can_be_alone_is_not_sealed() {
        let actions = through(Known { armed: false, ..known() }, &[Event::Resumed]);
        assert!(matches!(actions[..], [Action::ResumeSealed, Action::TakeOver(_)]), "{actions:?}");
    }

    #[test]
    fn the_peers_word_decides() {
        for role in [Role::None, Role::Discarded] {
            assert!(matches!(last(known(), &[Event::Peer(role)]), Action::TakeOver(_)));
        }
        assert!(matches!(last(known(), &[Event::Peer(Role::Active)]), Action::GiveUp(_)));
        for role in [Role::Syncing, Role::Armed] {
            assert_eq!(last(known(), &[Event::Peer(role)]), Action::DiscardAtPeer);
            assert!(matches!(last(known(), &[Event::Peer(role), Event::PeerDiscarded]), Action::TakeOver(_)));
        }
    }

    /// F6: a winner may yet fail, so that the loser is neither opened nor destroyed meanwhile.
    #[test]
    fn an_activation_under_way_is_waited_for() {
        let activating = [Event::Peer(Role::Activating), Event::Waited, Event::Peer(Role::Activating)];
        assert_eq!(last(known(), &activating), Action::Wait);
        let over = [&activating[..], &[Event::PatienceOver]].concat();
        assert!(matches!(last(known(), &over), Action::StaySealed(_)));
    }

    #[test]
    fn silence_means_what_the_token_says() {
        let silent = [Event::Silent("cut".into()), Event::PatienceOver];
        assert!(matches!(last(known(), &silent), Action::TakeOver(_)), "the token is the primary's (F19)");
        let hold = Known { on_backup_loss: OnBackupLoss::Hold, ..known() };
        assert!(matches!(last(hold, &silent), Action::StaySealed(_)));
        let activates = Known { on_primary_loss: OnPrimaryLoss::Activate, ..known() };
        assert!(matches!(last(activates, &silent), Action::StaySealed(_)));
    }

    #[test]
    fn with_a_witness_only_its_record_decides() {
        let won = [Event::ClaimWon(key()), Event::Recording];
        assert_eq!(last(decided(), &[]), Action::Claim(key()), "the peer is not asked");
        assert_eq!(last(decided(), &won[..1]), Action::Activate(key()));
        assert!(matches!(last(decided(), &won), Action::TakeOver(_)));
        assert!(matches!(last(decided(), &[Event::ClaimRefused("absent".into())]), Action::StaySealed(_)));
        let unknown = [&[Event::ClaimUnknown("x".into())][..], &won].concat();
        assert!(matches!(last(decided(), &unknown[..1]), Action::AwaitClaim(..)));
        assert!(matches!(last(decided(), &unknown), Action::TakeOver(_)));
    }

    /// F6: lost is frozen, neither opened nor destroyed before the winner runs.
    #[test]
    fn a_lost_record_is_watched() {
        let lost = [Event::ClaimLost("B".into()), Event::Frozen];
        assert!(matches!(last(decided(), &lost[..1]), Action::Freeze(_)));
        assert_eq!(last(decided(), &lost), Action::WatchRecord(key()));
        let active = [&lost[..], &[Event::RecordActive("runs on B".into())]].concat();
        assert!(matches!(last(decided(), &active), Action::GiveUp(_)));
        let forfeited = [&lost[..], &[Event::RecordForfeited]].concat();
        assert_eq!(last(decided(), &forfeited), Action::Claim(key()));
    }

    #[test]
    fn a_guest_that_was_handed_over_waits_for_the_peers_word() {
        let handed = Known { handed_over: true, ..known() };
        let silent = [Event::Silent("cut".into()), Event::PatienceOver];
        assert!(matches!(last(handed.clone(), &silent), Action::StaySealed(_)));
        assert!(matches!(last(handed, &[Event::Peer(Role::Discarded)]), Action::TakeOver(_)));
    }

    /// A host that lost power has nothing to own: having the peer destroy its copy would leave none at all (hazard F6).
    #[test]
    fn a_host_without_the_domain_never_destroys_the_peers_copy() {
        assert!(matches!(last(Known { present: false, ..known() }, &[]), Action::StandAside(_)));
    }

    #[test]
    fn what_was_known_before_needs_no_asking() {
        assert!(matches!(last(Known { superseded: true, ..known() }, &[]), Action::GiveUp(_)));
        assert!(matches!(last(Known { peer: None, ..known() }, &[]), Action::TakeOver(_)));
        let told = Known { superseded: true, assume_owner: true, ..known() };
        assert!(matches!(last(told, &[]), Action::TakeOver(_)), "an operator's word counts most");
    }
}
