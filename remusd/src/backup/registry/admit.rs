//! Carries out what the admission decides about an offer.

use tokio::time::Instant;

use super::{Decline, Registry, not_party};
use crate::backup::admission::{Admission, Here, Refusal, Step};
use crate::backup::copy::Whose;
use crate::backup::host::IncomingDomain;
use crate::backup::incoming::{IncomingHandle, detection};
use crate::backup::machine::State;
use crate::ids::Nonce;
use crate::link::handshake::Incoming;
use crate::link::{ProtectOffer, RefuseCode};
use crate::pair::HostId;

impl Registry {
    /// Ends an older session of the same protection, if its primary evidently lives, owns the guest and has given that session up.
    pub(super) async fn make_room(&self, peer: &mut Incoming, offer: &ProtectOffer) -> Result<(), Decline> {
        let mut admission = Admission::new(peer.key.generation, detection(offer));
        loop {
            let here = self.here(offer).await?;
            match admission.step(&here, Instant::now().into_std()) {
                Step::Accept => return Ok(()),
                Step::Superseded => {
                    return Err(Decline::Superseded(format!(
                        "the copy of {} was activated here and runs; the copy on {} must stay stopped",
                        offer.domain, peer.hello.host
                    )));
                }
                Step::Refuse(refusal) => return Err(Decline::Refuse(refusal.code(), sentence(refusal, peer, offer))),
                Step::Challenge => {
                    let nonce = Nonce::random();
                    admission.asked(nonce, Instant::now().into_std());
                    peer.challenge(nonce).await.map_err(Decline::Lost)?;
                }
                Step::AwaitAnswer(until) => {
                    let answer = peer.challenge_answer(until.into()).await.map_err(Decline::Lost)?;
                    answer.into_iter().for_each(|nonce| admission.answered(nonce));
                }
                Step::Replace => {
                    let old = self.get(offer.protection);
                    if let Some(old) = old
                        && let Err(error) = old.replace().await
                    {
                        let text = format!(
                            "the older copy of {} on this host cannot be ended ({error}); restart remusd here",
                            offer.domain
                        );
                        return Err(Decline::Refuse(RefuseCode::Host, text));
                    }
                }
                Step::AwaitEnd => {
                    if let Some(old) = self.get(offer.protection) {
                        old.destroyed().await;
                    }
                }
            }
        }
    }

    /// A paired host neither takes another's copy nor speaks in its name; where no copy is left, anybody may begin.
    pub(super) fn check_party(
        &self,
        offer: &ProtectOffer,
        party: Option<HostId>,
        domains: &[IncomingDomain],
    ) -> Result<(), Decline> {
        let Some(host) = party else { return Ok(()) };
        let refuse = || Err(Decline::Refuse(RefuseCode::NotParty, not_party(&offer.domain)));
        if !offer.host_id.is_nil() && offer.host_id != host.0 {
            return refuse();
        }
        if self.is_party(party, offer.protection) {
            return Ok(());
        }
        let whose = Whose { uuid: offer.protection, name: offer.domain.clone() };
        let lives = self.get(offer.protection).is_some_and(|handle| {
            let state = handle.status().state;
            !matches!(state, State::Active | State::Discarded)
        });
        let is_there = |domain: &IncomingDomain| domain.uuid == offer.protection || whose.is_copy(domain);
        if lives || domains.iter().any(is_there) { refuse() } else { Ok(()) }
    }

    async fn here(&self, offer: &ProtectOffer) -> Result<Here, Decline> {
        let domains = self.host.domains().await?;
        let known = self.known();
        Ok(Here {
            record: known.records.get(&offer.protection).map(|record| (record.generation, record.phase)),
            state: known.handles.get(&offer.protection).map(IncomingHandle::status).map(|status| status.state),
            present: domains.iter().any(|domain| domain.uuid == offer.protection && !domain.dying),
        })
    }
}

fn sentence(refusal: Refusal, peer: &Incoming, offer: &ProtectOffer) -> String {
    match refusal {
        Refusal::Generation(seen) => format!(
            "this host has seen generation {seen} of this protection and {} is not newer; protect the domain again with a newer one",
            peer.key.generation
        ),
        Refusal::Activating => {
            format!(
                "the copy of {} is being activated on this host, or its claim given up; try again shortly",
                offer.domain
            )
        }
        Refusal::Silent => format!(
            "{} does not answer within {} ms, and the copy of {} on this host may be the only one: it is kept; try again, or \
             `remus discard {}` here",
            peer.hello.host, offer.detection_ms, offer.domain, offer.domain
        ),
    }
}
