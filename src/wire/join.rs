//! A set-up that joins a connection: proves over a new session that its engines are those of an older one. Knows nothing of sockets and
//! channels.

use super::secret::{sign, verify, Secret};
use super::session::{Direction, Exporter, Session};
use crate::status::{bail, Result};

/// What an engine says of the connection that a set-up joins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Join {
    /// Names the connection; not secret between its engines.
    pub connection: [u8; 16],
    /// Numbers the set-ups that join the connection, rising.
    pub number: u32,
    /// The channels to set up, as Ready numbers them, rising.
    pub channels: Vec<u16>,
    /// The control connection goes on over the socket of the set-up: how many records of the peer were opened.
    pub opened: Option<u64>,
    /// Proves all that, for this session alone.
    pub proof: [u8; 32],
}

/// What proves that an engine is one of a connection's two.
#[derive(Debug)]
pub(crate) struct Ticket {
    connection: [u8; 16],
    key: Secret,
}

impl Ticket {
    /// The ticket of a connection over `session`.
    ///
    /// # Errors
    /// `Resource` without memory for the key.
    pub(crate) fn new(session: &Session) -> Result<Ticket> {
        Ok(Ticket { connection: session.exporter.connection()?, key: session.exporter.join_key()? })
    }

    /// The connection's name.
    pub(crate) fn connection(&self) -> [u8; 16] {
        self.connection
    }

    /// What is proved: each engine proves it for what it sends, over the handshake of `new`.
    fn statement(&self, new: &Exporter, direction: Direction, join: (u32, &[u16], Option<u64>)) -> Result<Vec<u8>> {
        let (number, channels, opened) = join;
        let mut said = direction.label().to_vec();
        said.extend_from_slice(&new.binding()?);
        said.extend_from_slice(&self.connection);
        said.extend_from_slice(&number.to_le_bytes());
        said.push(u8::from(opened.is_some()));
        said.extend_from_slice(&opened.unwrap_or_default().to_le_bytes());
        channels.iter().for_each(|channel| said.extend_from_slice(&channel.to_le_bytes()));
        Ok(said)
    }

    /// What this engine says in the set-up over the session `new`.
    pub(crate) fn join(&self, new: &Session, number: u32, channels: Vec<u16>, opened: Option<u64>) -> Result<Join> {
        let proof = sign(&self.key, &self.statement(&new.exporter, new.ours, (number, &channels, opened))?)?;
        Ok(Join { connection: self.connection, number, channels, opened, proof })
    }

    /// Checks what the peer says in the set-up over the session `new`.
    ///
    /// # Errors
    /// `Auth` when it is not the peer of this connection that says so, in this very set-up.
    pub(crate) fn check(&self, new: &Session, join: &Join) -> Result<()> {
        let said = self.statement(&new.exporter, new.ours.other(), (join.number, &join.channels, join.opened))?;
        if join.connection != self.connection || !verify(&self.key, &said, &join.proof)? {
            bail!(Auth, "the proof that a set-up joins this connection is wrong");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::ErrorKind;

    /// Both engines of a session with this secret: the connector, and the listener.
    fn sessions(secret: u8) -> [Session; 2] {
        [Direction::ToListening, Direction::ToConnecting].map(|ours| Session::new(ours, &[secret; 64], b"test").unwrap())
    }

    #[test]
    fn a_join_is_good_for_its_connection_its_set_up_and_its_direction_alone() {
        let (old, new, other) = (sessions(1), sessions(2), sessions(3));
        let [ours, theirs] = old.each_ref().map(|session| Ticket::new(session).unwrap());
        assert_eq!(ours.connection(), theirs.connection());
        let join = ours.join(&new[0], 7, vec![1, 64], Some(3)).unwrap();
        assert!(theirs.check(&new[1], &join).is_ok());
        let answer = theirs.join(&new[1], 7, vec![1, 64], None).unwrap();
        assert!(ours.check(&new[0], &answer).is_ok());
        let refused = |what: &str, checked: Result<()>| assert_eq!(checked.unwrap_err().kind(), ErrorKind::Auth, "{what}");
        refused("replayed in another set-up", theirs.check(&other[1], &join));
        refused("sent back", ours.check(&new[0], &join));
        refused("an unknown connection", Ticket::new(&other[1]).unwrap().check(&new[1], &join));
        refused("another number", theirs.check(&new[1], &Join { number: 8, ..join.clone() }));
        refused("other channels", theirs.check(&new[1], &Join { channels: vec![1], ..join.clone() }));
        refused("another number of records", theirs.check(&new[1], &Join { opened: Some(4), ..join.clone() }));
        refused("no number of records", theirs.check(&new[1], &Join { opened: None, ..join.clone() }));
        refused("another name", theirs.check(&new[1], &Join { connection: [0; 16], ..join.clone() }));
        let mut proof = join.proof;
        proof[31] ^= 1;
        refused("another proof", theirs.check(&new[1], &Join { proof, ..join }));
    }
}
