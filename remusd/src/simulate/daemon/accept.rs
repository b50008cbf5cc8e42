//! What the backup's registry does with links that arrive: answers questions, accepts or refuses offers.

use super::{GUEST, IncomingDisk, session};
use crate::backup::machine::{Event as BackupEvent, State as BackupState};
use crate::backup::record::Phase;
use crate::ids::SessionKey;
use crate::link::codec::Decoder;
use crate::link::frame::VERSION_HANDSHAKE;
use crate::link::{Frame, Purpose, QueryEntry, RefuseCode, Role, Token, Welcome};
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
    /// The receiver is being started.
    pub(super) receiver: Option<u64>,
}

impl World {
    pub(super) fn hello_arrives(&mut self, host: HostIx, conn: ConnId, parcel: Parcel) {
        let Some(daemon) = &mut self.hosts[host].daemon else { return };
        let Parcel::Bytes(bytes) = parcel else {
            daemon.offers.retain(|offer| offer.conn != conn || offer.receiver.is_some());
            return;
        };
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
                daemon.offers.push(Offer { conn, key, session, decoder, receiver: None });
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
        if let Some(incoming) = here.daemon.as_ref().and_then(|daemon| daemon.incoming.as_ref()) {
            return match incoming.machine.state() {
                BackupState::Syncing => Role::Syncing,
                BackupState::Armed | BackupState::Waiting => Role::Armed,
                BackupState::Activating
                | BackupState::Claiming
                | BackupState::Confirming
                | BackupState::Yielding
                | BackupState::Starting => Role::Activating,
                BackupState::Active => Role::Active,
                BackupState::Discarding | BackupState::Forfeiting | BackupState::Discarded => Role::Discarded,
            };
        }
        match here.disk.incoming.map(|record| record.phase) {
            None => Role::None,
            Some(Phase::Receiving | Phase::Discarded) => Role::Discarded,
            Some(Phase::Starting) => Role::Activating,
            Some(Phase::Active) => Role::Active,
        }
    }

    /// The registry's decisions about an offer, in its order.
    pub(in crate::simulate) fn continue_accepting(&mut self, host: HostIx) {
        self.continue_closing(host);
        loop {
            let Some(daemon) = &mut self.hosts[host].daemon else { return };
            let Some(offer) = daemon.offers.first().filter(|offer| offer.receiver.is_none()) else { return };
            let (conn, key) = (offer.conn, offer.key);
            let decline = |text: &str| Frame::Refuse { code: RefuseCode::InUse, text: text.into() };
            let state = daemon.incoming.as_ref().map(|incoming| incoming.machine.state());
            let record = self.hosts[host].disk.incoming;
            let active = record.is_some_and(|r| r.phase == Phase::Active) || state == Some(BackupState::Active);
            let refusal = if active && self.name_taken(host) {
                Some(Frame::Superseded { text: "the copy runs here".into() })
            } else if record.is_some_and(|record| key.generation.0 <= record.generation) {
                Some(decline("an old generation"))
            } else {
                match state {
                    Some(
                        BackupState::Activating
                        | BackupState::Claiming
                        | BackupState::Confirming
                        | BackupState::Starting,
                    ) => Some(decline("the copy is being activated")),
                    Some(BackupState::Syncing | BackupState::Armed | BackupState::Waiting | BackupState::Yielding) => {
                        return self.backup_event(host, |incoming, world, host| {
                            incoming.step(world, host, BackupEvent::Replaced)
                        });
                    }
                    Some(BackupState::Discarding | BackupState::Forfeiting) => return,
                    Some(BackupState::Active | BackupState::Discarded) | None => {
                        self.name_taken(host).then(|| decline("the name is taken"))
                    }
                }
            };
            if let Some(refusal) = refusal {
                if let Some(daemon) = &mut self.hosts[host].daemon {
                    daemon.offers.remove(0);
                }
                self.answer(conn, key, &refusal);
                continue;
            }
            self.destroy_incoming(host);
            self.hosts[host].disk.incoming = Some(IncomingDisk {
                generation: key.generation.0,
                phase: Phase::Receiving,
                token: Token::Primary,
                owed: false,
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
            return;
        }
    }

    pub(in crate::simulate) fn accepted(&mut self, host: HostIx, conn: ConnId) {
        let Some(daemon) = &mut self.hosts[host].daemon else { return };
        let Some(at) = daemon.offers.iter().position(|offer| offer.conn == conn) else { return };
        let Offer { key, session, decoder, receiver, .. } = daemon.offers.remove(at);
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
        let (encoder, bytes) = link::first(key, &welcome);
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
