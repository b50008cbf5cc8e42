//! What the backup's registry does with links that arrive: answers questions, accepts or refuses offers.

use std::time::Duration;

use super::{GUEST, IncomingDisk, session};
use crate::backup::admission::{Admission, Here, Step};
use crate::backup::machine::Event as BackupEvent;
use crate::backup::record::Phase;
use crate::ids::{Generation, Nonce, SessionKey};
use crate::link::codec::{Decoder, Encoder};
use crate::link::frame::VERSION_HANDSHAKE;
use crate::link::{Frame, Purpose, QueryEntry, RefuseCode, Role, Token, Welcome};
use crate::simulate::DETECTION;
use crate::simulate::backup::Incoming;
use crate::simulate::link::{self, Heard, LinkEnd};
use crate::simulate::net::{ConnId, Parcel};
use crate::simulate::plan::{HostIx, MS};
use crate::simulate::world::{Input, World};

/// An offer that is being looked at.
pub(super) struct Offer {
    pub(super) conn: ConnId,
    key: SessionKey,
    session: u64,
    decoder: Decoder,
    encoder: Encoder,
    admission: Admission,
    /// The receiver is being started.
    pub(super) receiver: Option<u64>,
}

impl World {
    pub(super) fn hello_arrives(&mut self, host: HostIx, conn: ConnId, parcel: Parcel) {
        let Some(daemon) = &mut self.hosts[host].daemon else { return };
        let Parcel::Bytes(bytes) = parcel else {
            daemon.offers.retain(|offer| offer.conn != conn || offer.receiver.is_some());
            return self.continue_accepting(host);
        };
        if let Some(offer) = daemon.offers.iter_mut().find(|offer| offer.conn == conn) {
            offer.decoder.push(&bytes);
            match offer.decoder.next_frame() {
                Ok(Some(Frame::ChallengeAnswer { nonce })) => offer.admission.answered(nonce),
                Ok(_) | Err(_) => {
                    daemon.offers.retain(|offer| offer.conn != conn || offer.receiver.is_some());
                    self.net_close(conn, 1);
                }
            }
            return self.continue_accepting(host);
        }
        let mut decoder = Decoder::accepting();
        decoder.push(&bytes);
        let (Ok(Some(Frame::Hello(hello))), Some(key)) = (decoder.next_frame(), decoder.key()) else {
            self.net_close(conn, 1);
            return;
        };
        if !daemon.ready {
            self.net_close(conn, 1);
            return;
        }
        match hello.purpose {
            Purpose::Query { .. } => {
                let entry = QueryEntry {
                    protection: GUEST,
                    role: self.role(host),
                    generation: key.generation,
                    acked: None,
                    domid: None,
                };
                self.answer(conn, key, &Frame::QueryResult(vec![entry]));
            }
            Purpose::Protect(_) => {
                let session = session(key.generation, 1 - host);
                let limit = Duration::from_micros(DETECTION);
                let admission = Admission::new(key.generation, limit);
                let encoder = Encoder::new(key);
                daemon.offers.push(Offer { conn, key, session, decoder, encoder, admission, receiver: None });
                self.continue_accepting(host);
            }
        }
    }

    fn answer(&mut self, conn: ConnId, key: SessionKey, frame: &Frame) {
        let (_, bytes) = link::first(key, frame);
        self.net_send(conn, 1, bytes);
        self.net_close(conn, 1);
    }

    /// What this host is to the protection, as the registry tells it.
    fn role(&self, host: HostIx) -> Role {
        let here = &self.hosts[host];
        match here.daemon.as_ref().and_then(|daemon| daemon.incoming.as_ref()) {
            Some(incoming) => incoming.machine.state().role(),
            None => here.disk.incoming.map_or(Role::None, |record| record.phase.role()),
        }
    }

    /// What the registry does about offers, one after the other.
    pub(in crate::simulate) fn continue_accepting(&mut self, host: HostIx) {
        self.continue_closing(host);
        loop {
            let present = self.name_taken(host);
            let now = self.instant();
            let here = &mut self.hosts[host];
            let record = here.disk.incoming.map(|record| (Generation(record.generation), record.phase));
            let Some(daemon) = &mut here.daemon else { return };
            let state = daemon.incoming.as_ref().map(|incoming| incoming.machine.state());
            let Some(offer) = daemon.offers.first_mut().filter(|offer| offer.receiver.is_none()) else { return };
            let (conn, key) = (offer.conn, offer.key);
            let step = offer.admission.step(&Here { record, state, present }, now);
            self.note(|_| format!("host {host}: an offer of generation {}: {step:?}", key.generation));
            match step {
                Step::Accept if present => self.decline(host, RefuseCode::InUse),
                Step::Refuse(refusal) => self.decline(host, refusal.code()),
                Step::Superseded => {
                    let text = "the copy runs here".into();
                    self.answer_first(host, &Frame::Superseded { text });
                }
                Step::Challenge => {
                    let nonce = Nonce(uuid::Uuid::from_u64_pair(self.number(), 2));
                    let offers = self.hosts[host].daemon.as_mut().map(|daemon| &mut daemon.offers);
                    let Some(offer) = offers.and_then(|offers| offers.first_mut()) else { return };
                    offer.admission.asked(nonce, now);
                    let challenge = link::next(&mut offer.encoder, &Frame::Challenge { nonce });
                    self.net_send(conn, 1, challenge);
                    self.later(host, DETECTION, Input::Unanswered);
                }
                Step::AwaitAnswer(_) | Step::AwaitEnd => return,
                Step::Replace => {
                    return self
                        .backup_event(host, |incoming, world, host| incoming.step(world, host, BackupEvent::Replaced));
                }
                Step::Accept => return self.begin_accepting(host, conn, key),
            }
        }
    }

    fn begin_accepting(&mut self, host: HostIx, conn: ConnId, key: SessionKey) {
        self.destroy_incoming(host);
        self.hosts[host].disk.incoming = Some(IncomingDisk {
            generation: key.generation.0,
            phase: Phase::Receiving,
            token: Token::Primary,
            owed: false,
            disks: false,
        });
        if self.step(host) {
            return;
        }
        let number = self.start_receiver(host, session(key.generation, 1 - host));
        if let Some(offer) = self.hosts[host].daemon.as_mut().and_then(|daemon| daemon.offers.first_mut()) {
            offer.receiver = Some(number);
        }
        let time = self.takes(MS);
        self.later(host, time, Input::Accepted(conn));
    }

    fn decline(&mut self, host: HostIx, code: RefuseCode) {
        self.answer_first(host, &Frame::Refuse { code, text: String::new() });
    }

    /// The last word about the first offer.
    fn answer_first(&mut self, host: HostIx, frame: &Frame) {
        let Some(daemon) = &mut self.hosts[host].daemon else { return };
        let mut offer = daemon.offers.remove(0);
        let bytes = link::next(&mut offer.encoder, frame);
        self.net_send(offer.conn, 1, bytes);
        self.net_close(offer.conn, 1);
    }

    pub(in crate::simulate) fn accepted(&mut self, host: HostIx, conn: ConnId) {
        let Some(daemon) = &mut self.hosts[host].daemon else { return };
        let Some(at) = daemon.offers.iter().position(|offer| offer.conn == conn) else { return };
        let Offer { session, decoder, mut encoder, receiver, .. } = daemon.offers.remove(at);
        let number = receiver.unwrap_or_default();
        let welcome = Frame::Welcome(Welcome {
            version: VERSION_HANDSHAKE,
            capabilities: 0,
            software: String::new(),
            host: String::new(),
            wall_clock_ms: 0,
            host_id: uuid::Uuid::nil(),
            knows_record: false,
        });
        let open = self.conns[conn].ends[1].open;
        let bytes = link::next(&mut encoder, &welcome);
        if open {
            self.net_send(conn, 1, bytes);
        }
        let link = LinkEnd::new(self, host, conn, 1, encoder, decoder);
        let incoming = Incoming::new(self, host, session, link, number);
        if let Some(daemon) = &mut self.hosts[host].daemon {
            daemon.incoming = Some(incoming);
        }
        let dead = self.hosts[host].receiver.as_ref().is_none_or(|receiver| receiver.number != number);
        self.backup_event(host, |incoming, world, host| {
            if dead && !incoming.step(world, host, BackupEvent::ReceiverDied("it has ended".into())) {
                return false;
            }
            open || incoming.heard(world, host, Heard::Closed)
        });
    }
}
